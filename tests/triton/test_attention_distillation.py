"""How the kernel that compares attention scores is cut: columns, blocks, parts of the loss, and bounds that are wrong;
tests/ops/test_attention_distillation.py runs on it too."""

import pytest
import torch
from op_cases import assert_solves, problem
from torch.nn import functional as F

pytest.importorskip("triton")
import triton.language as tl

import fastbert
from fastbert.kernels import attention_distillation as kernels
from fastbert.ops.attention_distillation import attention_distillation


def packed(lengths, dtype, *shape):
    """q and k as views of one projection."""
    return torch.randn(sum(lengths), 3, *shape).to(dtype).unbind(1)[:2]


def bounds_of(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def judge(dtype, lengths, own, teacher):
    """Loss, dq and dk against float64; `own` and `teacher` are heads and their size."""
    mine, theirs = packed(lengths, dtype, *own), packed(lengths, dtype, *teacher)

    def loss(q, k):
        return attention_distillation(q, k, *(x.to(q.dtype) for x in theirs), bounds_of(lengths), max(lengths))

    assert_solves(loss, problem(mine, torch.ones(()), loss), ("loss", "dq", "dk"))


COLUMNS = {  # heads and their size, the student's and the teacher's
    "three pieces": ((3, 64), (1, 192)),
    "two pieces and a rest": ((3, 50), (1, 130)),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_piece_by_piece(triton, nan_filled, dtype, columns):
    judge(dtype, [9], *COLUMNS[columns])


def test_blocks_of_16_bits(triton, nan_filled):
    judge(torch.bfloat16, [66, 1], (1, 26), (1, 60))


def test_parts_of_the_loss_and_sequences_block_by_block(interpreted, monkeypatch):
    monkeypatch.setattr(kernels, "PARTS", tl.constexpr(2))
    monkeypatch.setattr(kernels, "SEQUENCES", tl.constexpr(2))
    judge(torch.float32, [33, 2, 0, 3], (1, 4), (1, 4))


def test_no_number_of_a_sequence_reaches_another(triton):
    (q, k), (teacher_q, teacher_k) = packed([3, 4], torch.float32, 1, 8), packed([3, 4], torch.float32, 1, 8)
    q[1], k[2] = torch.inf, torch.nan
    loss, dq, dk = kernels.attention_distillation(q, k, teacher_q, teacher_k, bounds_of([3, 4]), 4)
    assert loss.isnan() and dq[:3].isnan().all() and dk[2].isnan().all()
    assert dq[3:].isfinite().all() and dk[3:].isfinite().all()


# Boundaries of 6 tokens and the sequence at fault: one decreases, two pass the tokens, one is longer than max_seqlen,
# and two leave out the first token or the last.
WRONG = [
    ([0, 4, 2, 6], 1), ([0, 3, 7], 1), ([-1, 3, 6], 0), ([0, 5, 6], 0), ([1, 3, 6], 0), ([0, 3, 5], 1),
]  # fmt: skip


@pytest.mark.parametrize(("bounds", "place"), WRONG, ids=str)
def test_sequences_that_do_not_hold_are_reported_and_touch_nothing(triton, bounds, place):
    x = torch.randn(6, 1, 16)
    with pytest.raises(ValueError, match=rf"attention was given cu_seqlens .* at sequence {place}:"):
        attention_distillation(x, x, x, x, torch.tensor(bounds, dtype=torch.int32), 4)
        fastbert.check_device_errors()


def test_no_token_gives_0_and_no_sequence_for_tokens_is_refused(triton):
    none, x = torch.zeros(0, 2, 3), torch.zeros(3, 2, 3)
    assert attention_distillation(none, none, none, none, torch.zeros(1, dtype=torch.int32), 1) == 0
    with pytest.raises(ValueError, match="make up the 3 tokens, got 0 sequences of at most 5"):
        attention_distillation(x, x, x, x, torch.zeros(1, dtype=torch.int32), 5)
