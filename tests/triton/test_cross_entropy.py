"""Rows that begin anywhere, and labels that nobody has looked at before the kernel does."""

import pytest
import torch
from op_cases import Problem, assert_solves
from torch.nn import functional as F

import fastbert
from fastbert.ops import cross_entropy as op
from fastbert.testing import run


def losses(x, labels):
    return fastbert.cross_entropy(x, labels, reduction="none")


@pytest.mark.parametrize("padding", [0, 6])
def test_berts_vocabulary(interpreted, nan_filled, padding):
    """Rows begin at multiples of 4 bytes only, and body and ends are taken apart; padded, they are all body."""
    x = torch.full((2, 30_522 + padding), torch.nan, dtype=torch.bfloat16)[:, :30_522]
    x.copy_(3 * torch.randn(x.shape))
    labels, dlosses = torch.tensor([0, 30_521]), torch.randn(2)
    baseline, truth = (
        run(lambda y: F.cross_entropy(y, labels, reduction="none"), (y,), dlosses) for y in (x.float(), x.double())
    )
    baseline = [baseline[0], baseline[1].bfloat16()]
    assert_solves(lambda y: losses(y, labels), Problem((x,), dlosses, baseline, truth), ("losses", "dlogits"))


def test_logits_and_gradient_aligned_differently(interpreted):
    """Then no group of 16 bytes of one is a group of the other."""
    x = torch.randn(2 * 1400 + 3)[3:].view(2, 1400)
    labels, dlosses = torch.tensor([0, 1399]), torch.tensor([1.0, -2.0])
    for mine, true in zip(
        run(lambda y: losses(y, labels), (x,), dlosses),
        run(lambda y: F.cross_entropy(y, labels, reduction="none"), (x.double(),), dlosses.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("columns", [24, 5000])
@pytest.mark.parametrize("label", ["the number of columns", -1, 2**40])
def test_a_label_outside_is_reported(interpreted, monkeypatch, columns, label):
    """Its row is NaN, the others and what stands between the rows are as without it; on a GPU the next call says so."""
    from fastbert.kernels import faults

    wider = torch.randn(4, columns + 8)
    labels = torch.tensor([1, columns if isinstance(label, str) else label, -100, 3])
    logits, dlosses, functions = wider[:, :columns], torch.ones(4), op.functions["triton"]
    with pytest.raises(ValueError, match=r"^cross_entropy .* in row 1: loss and gradient of that row are NaN$"):
        functions.cross_entropy_forward(logits, labels, -100, "none")
    monkeypatch.setattr(faults, "raise_interpreted", lambda x: None)  # as on a GPU, whose results nobody waits for
    results, maximum, total, *_ = functions.cross_entropy_forward(logits, labels, -100, "none")
    dlogits = functions.cross_entropy_backward(dlosses, logits, labels, maximum, total, None, -100)
    with pytest.raises(ValueError, match="in row 1"):
        functions.cross_entropy_forward(logits, labels, -100, "none")
    fastbert.check_device_errors()  # raised once
    assert results[1].isnan() and results[[0, 2, 3]].isfinite().all() and results[2] == 0
    assert dlogits[1].isnan().all() and dlogits[[0, 2, 3]].isfinite().all() and not dlogits[2].any()
    assert not dlogits.as_strided((4, 8), (columns + 8, 1), columns).any()
