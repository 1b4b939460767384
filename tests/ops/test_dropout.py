"""Dropout: by the contract's mask, equal on every backend and on any thread count, its gradient the same mask."""

import pytest
import torch
from op_cases import assert_same_for_threads

import fastbert
from fastbert.ops import dropout as op
from fastbert.ops import philox

SEED = torch.tensor([-(2**40) - 3])
SHAPES = {
    "one element": (1, 1),
    "a tail": (5, 7),
    "one block": (3, 256),
    "rows of several draws": (4, 2057),
    "none": (0, 8),
}


def expected(x, p):
    """Kept and scaled as the contract says, in float64."""
    t = philox.threshold(p)
    keep = philox.lanes(x.shape[-1], torch.arange(x.shape[0]).unsqueeze(-1), 0, 0, SEED) >= t
    return torch.where(keep, x.double() * philox.scale(t), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_contracts(backend, nan_filled, shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    for p in (0.1, 0.9, 1.0):
        y = fastbert.dropout(x, p, SEED)
        (dx,) = torch.autograd.grad(y, x, dy)
        for ours, truth in ((y, expected(x.detach(), p)), (dx, expected(dy, p))):
            assert ours.dtype == dtype
            # the factor is float32, so one rounding of it and one of the result
            torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert torch.equal(ours == 0, truth.to(dtype) == 0)
        with torch.no_grad():
            assert torch.equal(fastbert.dropout(x, p, SEED), y)


def test_it_is_the_mask_of_layer_norm(backend):
    x, ones, zeros = torch.randn(6, 300), torch.ones(300), torch.zeros(300)
    y = fastbert.dropout(x, 0.3, SEED)
    assert torch.equal(
        fastbert.layer_norm(y, ones, zeros), fastbert.dropout_add_layer_norm(x, None, ones, zeros, 1e-12, 0.3, SEED)
    )


def test_any_number_of_threads_and_any_strides(kernels):
    x = torch.randn(300, 400)
    assert_same_for_threads(lambda: [fastbert.dropout(x, 0.5, SEED)])
    assert torch.equal(fastbert.dropout(x.T, 0.5, SEED), fastbert.dropout(x.T.contiguous(), 0.5, SEED))
    t = philox.threshold(0.5)
    torch.testing.assert_close(fastbert.dropout(x, 0.5, SEED), op.reference.dropout(x, t, SEED), rtol=0, atol=0)


def test_seeds_come_from_torch():
    x = torch.ones(4, 64)
    torch.manual_seed(3)
    first, second = fastbert.dropout(x), fastbert.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(fastbert.dropout(x), first) and not torch.equal(first, second)
    assert fastbert.dropout(x, 0.0) is x
    assert torch.autograd.gradcheck(
        lambda x: fastbert.dropout(x, 0.3, SEED), torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"0 <= dropout_p <= 1, got 1\.5"):
        fastbert.dropout(torch.ones(3), 1.5)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        fastbert.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must be an int64 tensor"):
        fastbert.dropout(torch.ones(3), 0.5, torch.ones(2))
