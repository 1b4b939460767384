"""What the comparison of scores does on a GPU besides its results: what it moves, and sequences that cannot be."""

import math

import emulated_backend
import pytest
import torch

import fastbert
from fastbert.ops.attention_distillation import functions

INPUTS = "q", "k", "teacher_q", "teacher_k"


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.nested)], ids=["values", "trace"])
def module(request):
    with emulated_backend.chosen(request.param) as module:
        yield module


def given(tokens, heads, size, teacher_size):
    mine, theirs = torch.randn(tokens, 3, heads, size), torch.randn(tokens, 3, heads, teacher_size)
    return *mine.unbind(1)[:2], *theirs.unbind(1)[:2]


@pytest.mark.nested
@pytest.mark.parametrize("module", [True], indirect=True, ids=["trace"])
def test_banks_and_sectors(module):
    """Two heads of BERT: no access to shared memory takes more than twice as long as it must, the products' none at
    all, and inputs and results move in whole sectors."""
    module.sample = 1 << 20  # all blocks
    functions["cuda"].attention_distillation(*given(128, 2, 64, 64), torch.tensor([0, 128], dtype=torch.int32), 128)
    tables = module.library.accesses()
    shared = [a for a in tables if a.shared]
    assert all(a.conflicts <= 2 for a in shared), module.library.table()
    assert all(a.conflicts == 1 for a in shared if a.access == "read"), module.library.table()
    moved = [a for a in tables if a.memory in (*INPUTS, "dq", "dk")]
    assert {a.memory for a in moved} == {*INPUTS, "dq", "dk"}
    assert all(a.cost == a.ideal for a in moved), module.library.table()


@pytest.mark.parametrize(
    ("bounds", "place"),
    [([0, 9, 5], 1), ([0, 5, 13], 1), ([0, 12], 0), ([0, 5, 11], 1), ([1, 5, 12], 0)],
    ids=["decrease", "pass T", "too long", "not to the end", "not from the start"],
)
def test_of_sequences_that_cannot_be_the_loss_is_nan_and_the_next_call_reports_them(module, bounds, place):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    loss, _, _ = functions["cuda"].attention_distillation(*given(12, 2, 8, 4), cu_seqlens, 9)
    assert math.isnan(loss)
    with pytest.raises(ValueError, match=rf"attention was given cu_seqlens .* at sequence {place}:"):
        fastbert.check_device_errors()


def test_many_sequences_and_a_bound_far_past_the_tokens(module):
    """More sequences than a block of the second kernel has threads; most are empty."""
    lengths = torch.zeros(1030, dtype=torch.int64)
    lengths[[0, 500, 1023, 1024, 1029]] = torch.tensor([3, 1, 2, 5, 4])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs = given(15, 1, 4, 4)
    ours = functions["cuda"].attention_distillation(*inputs, cu_seqlens, 2**31 - 1)
    torch.testing.assert_close(ours, functions["reference"].attention_distillation(*inputs, cu_seqlens, 5))
