"""embedding_norm's CUDA kernels: every row is read once and written once; what does not fit is reported."""

import pytest
import torch

from fastbert.ops import embedding_norm as op
from fastbert.ops import philox

SEED, T = torch.tensor([77]), philox.threshold(0.1)


def looked_up(tokens, columns, dtype):
    """Each token's rows are its own, so that traffic can be counted; token types are of row 0."""
    words, positions, types = (torch.randn(rows, columns).to(dtype) for rows in (tokens, tokens, 2))
    order = torch.arange(tokens)
    return words, positions, types, None, order, order.flip(0), None, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_move_once_in_whole_sectors(traced, dtype):
    given, weight = looked_up(24, 768, dtype), torch.ones(768)
    op.functions["cuda"].embedding_norm_forward(*given, weight, weight, 1e-12, T, SEED, dtype)
    tensor = 24 * 768 * given[0].element_size()
    traffic = traced.library.traffic()
    assert all(row.cost == row.ideal for row in traced.library.accesses()), traced.library.table()
    for name in (("words", "read"), ("positions", "read"), ("y", "write")):
        assert traffic[name] == tensor
    op.functions["cuda"].embedding_norm_recompute(torch.randn(24, 768).to(dtype), *given, T, SEED)
    traffic = traced.library.traffic()
    for name in (("words", "read"), ("positions", "read"), ("dy", "read"), ("z", "write"), ("dropped", "write")):
        assert traffic[name] == tensor


def test_an_id_outside_its_table_is_reported_and_makes_its_token_nan(module):
    words, positions, types, _, order, reverse, *_ = looked_up(6, 40, torch.float32)
    weight, wrong = torch.ones(40), order.clone()
    wrong[4] = 6
    y, _, _ = op.functions["cuda"].embedding_norm_forward(
        words, positions, types, None, wrong, reverse, None, None, weight, weight, 1e-12, 0, None, torch.float32
    )
    assert y[4].isnan().all() and y[[0, 1, 2, 3, 5]].isfinite().all()
    with pytest.raises(ValueError, match="embedding_norm was given an id outside its table, for token 4"):
        module.compiled.check_faults()


def test_more_columns_than_registers_hold_are_refused(module):
    with pytest.raises(RuntimeError, match=r"embedding_norm_forward: at most .* of 16384 columns, got \[1, 16385\]"):
        module.compiled.embedding_norm_forward(*[0] * 8, *[1] * 4, 1, 16385, 0, 0, 0, *[0] * 2, 1e-5, *[0] * 6)
