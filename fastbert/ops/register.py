"""How ops are registered with torch, and that they are differentiated once."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_library = torch.library.Library("fastbert", "FRAGMENT")

# Who looks at every op of this thread: modes (their number; 1 where torch does not tell), a tracer, the profiler.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracer = getattr(torch._C, "_get_tracing_state", lambda: True)
_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_has_storage = getattr(torch._C, "_has_storage", lambda x: False)  # a batched tensor has none


def register(function: Callable) -> Callable:
    """Decorator: an opaque op `fastbert::<name>` that changes none of its inputs, for every device.

    What `torch.library.custom_op` makes, less its look for aliases at every call, which takes longer than the rest of
    a call (12 microseconds of 17); `torch.library.opcheck` looks for them in the tests.

    The function that is returned goes around torch's dispatcher where nobody would notice: once a kernel has pushed the
    dispatcher's code out of the caches, the way through it takes 0.1 ms, a fifth of a LayerNorm. Whatever looks at ops
    does see this one: compilers and tracers, modes (fake tensors, counters of operations), subclasses of Tensor,
    batched tensors (of a Jacobian in one piece) and the profiler. It also resolves lazy negatives.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fastbert, name).default

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _modes() or _tracer() is not None or _profiled():
            return op(*arguments)
        for x in arguments:
            if not isinstance(x, Tensor):
                continue
            if (type(x) is not Tensor and type(x) is not Parameter) or x.is_neg() or not _has_storage(x):
                return op(*arguments)
        return function(*arguments)

    return call


class _Refusing(torch.autograd.Function):
    """x, which depends on `sources`, and no derivative."""

    @staticmethod
    def forward(ctx, x, *sources):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        raise RuntimeError(
            "fastbert's ops are once_differentiable: a gradient of theirs, as of a gradient penalty, has none itself. "
            "Compute it with torch's own functions"
        )


def once_differentiable(backward: Callable) -> Callable:
    """Decorator of an autograd.Function's backward pass: differentiating its results raises a RuntimeError.

    torch's own decorator says nothing where the gradient that comes in is a constant, as of a sum, though its results
    depend on what was saved: then a second derivative is silently wrong.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        alone = isinstance(results, Tensor)
        sources = *gradients, *ctx.saved_tensors
        # Marked whether or not a source is: what was saved may stand for an input without being one.
        marked = [
            x if x is None else _Refusing.apply(x.detach().requires_grad_(), *sources)
            for x in ([results] if alone else results)
        ]
        return marked[0] if alone else tuple(marked)

    return call


def fake(name: str) -> Callable:
    """Decorator: says the shapes and dtypes of the results of `fastbert::<name>`, for torch.compile.

    Written by hand, though the twins would do: they take 2 to 60 times as long under fake tensors, most where dropout
    draws its mask, and a compiler asks some ten times for each call in a model. tests/test_fakes.py holds both to be
    the same.
    """
    return torch.library.register_fake(f"fastbert::{name}", lib=_library)
