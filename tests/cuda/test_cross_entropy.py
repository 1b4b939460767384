"""What cross entropy's kernels move, by the trace of the emulator, and labels that nobody can look at on a GPU."""

import pytest
import torch

import fastbert
from fastbert.ops import cross_entropy as op


def calls(logits, labels, dlosses):
    """Forward's results and the gradient."""
    functions = op.functions["cuda"]
    losses, maximum, total, *_ = functions.cross_entropy_forward(logits, labels, -100, "none")
    return losses, functions.cross_entropy_backward(dlosses, logits, labels, maximum, total, None, -100)


# Rows that begin at multiples of 16 bytes, of 4 and of 2, of a block and of a warp.
WIDTHS = {"bert's, padded": (30_522, 30_528), "bert's as it is": (30_522, 30_522), "of a warp": (2_999, 2_999)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_move_once_in_whole_sectors(traced, width, dtype):
    """Read once by each direction and the gradient written once, but for the sectors that two warps or rows share."""
    columns, stride = WIDTHS[width]
    logits = torch.randn(3, stride).to(dtype)[:, :columns]
    labels, dlosses = torch.tensor([0, columns - 1, 7]), torch.ones(3)
    functions, library, each = op.functions["cuda"], traced.library, 3 * columns * dtype.itemsize

    _, maximum, total, *_ = functions.cross_entropy_forward(logits, labels, -100, "none")
    forward = library.accesses(), library.traffic()
    functions.cross_entropy_backward(dlosses, logits, labels, maximum, total, None, -100)
    backward = library.accesses(), library.traffic()
    for (accesses, traffic), floor in zip((forward, backward), (each, each + 3 * stride * dtype.itemsize), strict=True):
        assert sum(traffic.values()) <= 1.1 * floor, library.table()
        costs, ideals = (sum(getattr(a, what) for a in accesses if not a.shared) for what in ("cost", "ideal"))
        assert ideals >= 0.95 * costs, library.table()
        wide = sum(a.lanes * a.bytes for a in accesses if a.memory in ("logits", "dlogits") and a.bytes == 16)
        assert wide >= 0.97 * floor  # what is left: the ends of the rows
        assert all(a.cost == a.ideal for a in accesses if a.shared), library.table()


def test_logits_and_gradient_aligned_differently(module):
    """Then no group of 16 bytes of one is a group of the other."""
    logits = torch.randn(2 * 1400 + 3)[3:].view(2, 1400)
    labels, dlosses = torch.tensor([0, 1399]), torch.tensor([1.0, -2.0])
    losses, dlogits = calls(logits, labels, dlosses)
    share = logits.double().softmax(1)
    expected = dlosses.double()[:, None] * (share - torch.nn.functional.one_hot(labels, 1400))
    torch.testing.assert_close(losses.double(), -share.gather(1, labels[:, None])[:, 0].log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dlogits.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("columns", [24, 5000])
@pytest.mark.parametrize("label", ["the number of columns", -1, 2**40])
def test_a_label_outside_is_reported_by_the_next_call(module, columns, label):
    """Its row is NaN, the others and what stands between the rows are as without it."""
    wider = torch.randn(4, columns + 8)
    labels = torch.tensor([1, columns if isinstance(label, str) else label, -100, 3])
    logits, dlosses = wider[:, :columns], torch.ones(4)
    losses, maximum, total, *_ = op.functions["cuda"].cross_entropy_forward(logits, labels, -100, "none")
    with pytest.raises(ValueError, match=r"in an earlier call: cross_entropy .* in row 1: loss and gradient"):
        fastbert.check_device_errors()
    dlogits = op.functions["cuda"].cross_entropy_backward(dlosses, logits, labels, maximum, total, None, -100)
    fastbert.check_device_errors()  # raised once
    assert losses[1].isnan() and losses[[0, 2, 3]].isfinite().all() and losses[2] == 0
    assert dlogits[1].isnan().all() and dlogits[[0, 2, 3]].isfinite().all() and not dlogits[2].any()
    assert not dlogits.as_strided((4, 8), (columns + 8, 1), columns).any()
