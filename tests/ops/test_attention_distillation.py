"""Attention scores of two models compared: by hand, against float64, with padding and in every dtype."""

import math

import pytest
import torch

from fastbert.ops.attention_distillation import AT_ONCE, attention_distillation


def inputs(dtype, heads=2, teacher_heads=2):
    torch.manual_seed(0)
    cu = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)
    mine, theirs = torch.randn(2, 11, heads, 3, dtype=torch.float64), torch.randn(2, 11, teacher_heads, 5).double()
    q, k = (x.to(dtype).requires_grad_() for x in mine)
    return q, k, *theirs.to(dtype), cu


def test_two_tokens_by_hand():
    q, k = torch.tensor([[[1.0]], [[-2.0]]], requires_grad=True), torch.tensor([[[3.0]], [[1.0]]], requires_grad=True)
    zero = torch.zeros(2, 1, 1)
    loss = attention_distillation(q, k, zero, zero, torch.tensor([0, 2], dtype=torch.int32), 2)
    loss.backward()
    assert loss.item() == (9 + 1 + 36 + 4) / 4  # scores 3, 1, -6, -2
    assert q.grad.flatten().tolist() == [(3 * 3 + 1) / 2, (-6 * 3 - 2) / 2]
    assert k.grad.flatten().tolist() == [(3 + 12) / 2, (1 + 4) / 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [7, 19])  # the longest sequence, and padding behind all
@pytest.mark.parametrize("at_once", [1, 10**6])  # a head at a time, and both
@pytest.mark.parametrize("heads", [(2, 2), (2, 6), (6, 2)], ids=["same heads", "fewer heads", "more heads"])
def test_loss_and_gradients_are_those_of_all_scores_at_once(dtype, longest, at_once, heads, monkeypatch):
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    q, k, teacher_q, teacher_k, cu = inputs(dtype, *heads)
    loss = 3 * attention_distillation(q, k, teacher_q, teacher_k, cu, longest)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    total, pairs = 0, 0
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("ind,jnd->nij", wide[0][a:b], wide[1][a:b]) / math.sqrt(3)
        others = torch.einsum("ind,jnd->nij", teacher_q[a:b].double(), teacher_k[a:b].double()) / math.sqrt(5)
        scores, others = (x.unflatten(0, (2, -1)).mean(1) for x in (scores, others))  # of neighbouring heads
        total, pairs = total + (scores - others).square().sum(), pairs + (b - a) ** 2
    truth = 3 * total / (2 * pairs)
    truth.backward()
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=min(rtol, 1e-5), atol=1e-12)
    for x, other in zip((q, k), wide, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), other.grad, rtol=rtol, atol=rtol)


def test_what_does_not_fit_is_refused_and_no_token_gives_zero():
    q, k, teacher_q, teacher_k, cu = inputs(torch.float32)
    for heads in (3, 0):
        others = torch.zeros(11, heads, 5)
        with pytest.raises(ValueError, match=f"multiple of the teacher's {heads} attention heads, got 2"):
            attention_distillation(q, k, others, others, cu, 7)
    with pytest.raises(ValueError, match=r"teacher_q must have q's tokens, \[11, heads, head size\], got \[10, 2, 5\]"):
        attention_distillation(q, k, teacher_q[1:], teacher_k[1:], cu, 7)
    with pytest.raises(ValueError, match="k must be like its queries"):
        attention_distillation(q, k[:5], teacher_q, teacher_k, cu, 7)
    for bounds, longest, why in (([0, 8, 5, 11], 11, "never decrease"), ([0, 4, 11], 6, "max_seqlen is 6")):
        with pytest.raises(ValueError, match=why):
            attention_distillation(q, k, teacher_q, teacher_k, torch.tensor(bounds, dtype=torch.int32), longest)
    nothing = torch.zeros(0, 2, 3, requires_grad=True)
    assert attention_distillation(nothing, nothing, nothing, nothing, cu[:1], 1) == 0
