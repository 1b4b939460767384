"""Dropout's kernels for NVIDIA GPUs, emulated: what they ask of memory."""

import pytest
import torch

from fastbert.ops import dropout as op
from fastbert.ops import philox

SEED = torch.tensor([5])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 768), torch.bfloat16),
        ((40, 768), torch.float32),
        ((7, 9 * 1024 + 4), torch.float32),
        ((64, 33), torch.float32),
    ],
    ids=["bf16", "float32", "half of a call's eight at the end", "rows off 16 bytes"],
)
def test_memory_moves_once_in_whole_sectors(traced, shape, dtype):
    x, t = torch.randn(shape).to(dtype), philox.threshold(0.3)
    y = op.functions["cuda"].dropout(x, t, SEED)
    torch.testing.assert_close(y, op.reference.dropout(x, t, SEED))
    assert all(row.cost == row.ideal for row in traced.library.accesses()), traced.library.table()
    traffic = traced.library.traffic()
    assert traffic["x", "read"] == traffic["y", "write"] == -(-y.numel() * y.element_size() // 32) * 32
