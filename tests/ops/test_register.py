"""Ops go around torch's dispatcher only where nobody looks at ops, and give the same results either way."""

import contextlib
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.ops.register import opaque

FORWARD, BACKWARD = "fastbert::layer_norm_forward", "fastbert::layer_norm_backward"


class Noting(TorchDispatchMode):
    """Notes the names of all ops."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor that notes the ops it meets."""

    names: ClassVar[set[str]] = set()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.add(function.name())
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in ((4, 24), (24,), (24,))]


def results(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    y = fastbert.layer_norm(x, weight, bias)
    return [y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))]


def test_modes_see_the_ops():
    with Noting() as noting:
        seen = results(*inputs())
    assert {FORWARD, BACKWARD} <= noting.names
    for a, b in zip(seen, results(*inputs()), strict=True):
        assert torch.equal(a, b)


def test_the_profiler_sees_the_ops():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        results(*inputs())
    assert {FORWARD, BACKWARD} <= {event.key for event in profiler.key_averages()}


def test_subclasses_of_tensor_see_the_ops():
    x, weight, bias = (x.detach() for x in inputs())
    expected = fastbert.layer_norm(x, weight, bias)
    for place in range(3):
        Wrapped.names.clear()
        given = [x.as_subclass(Wrapped) if i == place else x for i, x in enumerate((x, weight, bias))]
        assert torch.equal(fastbert.layer_norm(*given).as_subclass(Tensor), expected)
        assert "fastbert::layer_norm" in Wrapped.names


def test_fake_tensors_run_no_kernel():
    with FakeTensorMode() as mode:
        y, dx, dweight, dbias = results(*(torch.empty(x.shape, requires_grad=True) for x in inputs()))
    assert all(mode.is_our_fake(x) for x in (y, dx, dweight, dbias))
    assert y.shape == dx.shape == (4, 24) and dweight.shape == dbias.shape == (24,)


def test_batched_gradients_and_lazy_negatives_are_seen():
    x, weight, bias = inputs()
    y, directions = fastbert.layer_norm(x, weight, bias), torch.randn(3, 4, 24)
    batched = torch.autograd.grad(y, (x, weight, bias), directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for a, b in zip(batched, torch.autograd.grad(y, (x, weight, bias), direction, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)
    minus_one = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert minus_one.is_neg() and fastbert.gelu(minus_one) < 0


def probe(x: Tensor) -> Tensor:
    return x * 2


probe = opaque(probe, probe, torch.empty_like)


@pytest.mark.parametrize("looking", [contextlib.nullcontext, Noting])
def test_the_dispatcher_is_used_where_somebody_looks(looking):
    """Below the dispatcher autograd records nothing; without it the product is seen."""
    with looking():
        y = probe(torch.ones(2, requires_grad=True))
    name = type(y.grad_fn).__name__
    assert (name == "MulBackward0") == (looking is contextlib.nullcontext), name
