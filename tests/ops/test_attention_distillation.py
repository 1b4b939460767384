"""Attention scores of two models compared: by hand, against float64, with padding, in every dtype, on every backend."""

import math

import pytest
import torch
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

from fastbert.ops.attention_distillation import AT_ONCE, attention_distillation, functions

ONE_SEQUENCE = torch.tensor([0, 2], dtype=torch.int32)


def given(lengths, heads, teacher_heads, size, teacher_size, dtype=torch.float32):
    """q, k, teacher_q and teacher_k, views of two packed projections, and cu_seqlens."""
    generator = drawn("attention distillation", lengths, heads, teacher_heads, size, teacher_size)
    mine = torch.randn(sum(lengths), 3, heads, size, generator=generator)
    theirs = torch.randn(sum(lengths), 3, teacher_heads, teacher_size, generator=generator)
    return (*(x for both in (mine, theirs) for x in both.to(dtype).unbind(1)[:2]), bounds_of(lengths))


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_two_tokens_by_hand(backend):
    q, k = torch.tensor([[[1.0]], [[-2.0]]], requires_grad=True), torch.tensor([[[3.0]], [[1.0]]], requires_grad=True)
    zero = torch.zeros(2, 1, 1)
    loss = attention_distillation(q, k, zero, zero, ONE_SEQUENCE, 2)
    loss.backward()
    assert loss.item() == (9 + 1 + 36 + 4) / 4  # scores 3, 1, -6, -2
    assert q.grad.flatten().tolist() == [(3 * 3 + 1) / 2, (-6 * 3 - 2) / 2]
    assert k.grad.flatten().tolist() == [(3 + 12) / 2, (1 + 4) / 2]
    with torch.no_grad():
        assert attention_distillation(q, k, q, k, ONE_SEQUENCE, 2) == 0
        assert attention_distillation(q, k, math.inf * q, k, ONE_SEQUENCE, 2) == math.inf


@pytest.mark.parametrize("longest", [7, 19])  # the longest sequence, and padding behind all
@pytest.mark.parametrize("at_once", [1, 10**6])  # a head at a time, and both
@pytest.mark.parametrize("heads", [(2, 2), (2, 6), (6, 2)], ids=["same heads", "fewer heads", "more heads"])
def test_the_twin_is_all_scores_at_once(longest, at_once, heads, monkeypatch):
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    q, k, teacher_q, teacher_k, cu = given([3, 0, 1, 7], *heads, 3, 5, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k)]
    loss = 3 * attention_distillation(q, k, teacher_q, teacher_k, cu, longest)
    total, pairs = 0, 0
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("ind,jnd->nij", q[a:b], k[a:b]) / math.sqrt(3)
        others = torch.einsum("ind,jnd->nij", teacher_q[a:b], teacher_k[a:b]) / math.sqrt(5)
        scores, others = (x.unflatten(0, (2, -1)).mean(1) for x in (scores, others))  # of neighbouring heads
        total, pairs = total + (scores - others).square().sum(), pairs + (b - a) ** 2
    truth = 3 * total / (2 * pairs)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    ours, expected = (torch.autograd.grad(x, leaves) for x in (loss, truth))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


CASES = {  # lengths, heads, the teacher's, their sizes: which path each takes
    "tails, an empty sequence and one of a token": ([3, 0, 1, 7], 2, 2, 3, 5),
    "one number": ([1], 1, 1, 1, 1),
    "full tiles": ([64, 128], 1, 1, 64, 64),
    "above a block": ([130, 65], 1, 1, 26, 64),
    "the student's heads end to end, wider than a tile": ([70, 5], 6, 2, 26, 20),
    "the teacher's heads end to end, wider than a tile": ([33], 2, 6, 7, 24),
}


def solves(case, dtype):
    q, k, teacher_q, teacher_k, cu = given(*CASES[case], dtype)
    longest = max(CASES[case][0])

    def function(q, k, longest=longest):
        return attention_distillation(q, k, teacher_q.to(q.dtype), teacher_k.to(q.dtype), cu, longest)

    results = assert_solves(function, problem((q, k), torch.tensor(3.0), function), ("loss", "dq", "dk"))
    assert results[0].dtype == torch.float32 and results[1].dtype == results[2].dtype == dtype
    return results, lambda: assert_solves(
        lambda q, k: function(q, k, longest + 70), problem((q, k), torch.tensor(3.0), function), ("loss", "dq", "dk")
    )


@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, nan_filled, case):
    results, padded = solves(case, torch.float32)
    for one, other in zip(results, padded(), strict=True):
        assert backend == "reference" or torch.equal(one, other)  # padding is of no account


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes_against_float64(backend, nan_filled, dtype):
    solves("tails, an empty sequence and one of a token", dtype)
    solves("the student's heads end to end, wider than a tile", dtype)


def test_models_of_two_dtypes(backend):
    """Nothing is rounded: what is lost is what the narrower one has lost before."""
    *inputs, cu = given([9, 4], 2, 2, 8, 8)
    narrow = [x.bfloat16() for x in inputs]
    op = functions[backend].attention_distillation
    for one, other in ((narrow[:2], inputs[2:]), (inputs[:2], narrow[2:])):
        mixed, same = op(*one, *other, cu, 9), op(*(x.float() for x in (*one, *other)), cu, 9)
        assert all(torch.equal(a, b) for a, b in zip(mixed, same, strict=True))


def test_the_same_bits_whatever_the_threads(kernels):
    """A head of 300 tokens is more than a thread's share: its queries and keys become tasks of their own."""
    inputs = given([300, 40, 3], 1, 1, 20, 30)
    assert_same_for_threads(lambda: functions["cpu"].attention_distillation(*inputs, 300), (1, 2, 3, 8))


def test_what_does_not_fit_is_refused_and_no_token_gives_zero(best):
    q, k, teacher_q, teacher_k, cu = given([3, 0, 1, 7], 2, 2, 3, 5)
    for heads in (3, 0):
        others = torch.zeros(11, heads, 5)
        with pytest.raises(ValueError, match=f"multiple of the teacher's {heads} attention heads, got 2"):
            attention_distillation(q, k, others, others, cu, 7)
    with pytest.raises(ValueError, match=r"teacher_q must have q's tokens, \[11, heads, head size\], got \[10, 2, 5\]"):
        attention_distillation(q, k, teacher_q[1:], teacher_k[1:], cu, 7)
    with pytest.raises(ValueError, match="k must be like its queries"):
        attention_distillation(q, k[:5], teacher_q, teacher_k, cu, 7)
    with pytest.raises(ValueError, match="both models must be float64 or neither"):
        attention_distillation(q, k, teacher_q.double(), teacher_k.double(), cu, 7)
    if best != "cuda":  # there the boundaries are looked at by the kernels
        for bounds, longest, why in (([0, 8, 5, 11], 11, "never decrease"), ([0, 4, 11], 6, "max_seqlen is 6")):
            with pytest.raises(ValueError, match=why):
                attention_distillation(q, k, teacher_q, teacher_k, torch.tensor(bounds, dtype=torch.int32), longest)
    nothing = torch.zeros(0, 2, 3, requires_grad=True)
    for bounds in (cu[:1], torch.zeros(3, dtype=torch.int32)):
        loss = attention_distillation(nothing, nothing, nothing, nothing, bounds, 1)
        loss.backward()
        assert loss == 0 and nothing.grad.shape == nothing.shape
    with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot run attention_distillation here"):
        attention_distillation(*(x.double() for x in (q, k, teacher_q, teacher_k)), cu, 7, backend="cpu")
