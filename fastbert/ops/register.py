"""How ops are registered with torch, and that they are differentiated once."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastbert.backends import OPS, triton

# A tensor's device decides between the C++ modules, so a graph need not say which; Triton's are ops of their own.
_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("fastbert", "fastbert_triton")}

# Who looks at every op of this thread: modes (their number; 1 where torch does not tell), a tracer, the profiler, the
# transforms of torch.func.
_compiling = torch.compiler.is_compiling
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracer = getattr(torch._C, "_get_tracing_state", lambda: True)
_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_has_storage = getattr(torch._C, "_has_storage", lambda x: False)  # a batched tensor has none


def register(twins: type, kernels: ModuleType, changed: tuple[str, ...] = (), **fakes: Callable) -> dict[str, type]:
    """Opaque ops `fastbert::<name>`, one for each of `fakes`, and for those written in Triton too
    `fastbert_triton::<name>`.

    What `torch.library.custom_op` makes, less its look for aliases at every call, which takes longer than the rest of
    a call (12 microseconds of 17); `torch.library.opcheck` looks for them in the tests.

    Args:
        twins: the reference, whose functions' names and signatures are the ops'.
        kernels: a file of `fastbert.backends` with functions of the same names, which run on the CPU and on GPUs.
            `fastbert.kernels` has one of that name for Triton, which is imported when it is first called.
        changed: names of the arguments that they change in place; these have no result of their own.
        fakes: by name, what gives empty results of the right shapes and dtypes, for torch.compile. The twins would do,
            but take 2 to 60 times as long under fake tensors, most where dropout draws its mask, and a compiler asks
            some ten times for each call in a model. tests/ops/test_fakes.py holds both to be the same.

    Returns:
        By the name of a backend, the functions that run there.
    """
    # Of these a tensor's device decides.
    compiled = _namespace(twins, fakes, functools.partial(getattr, kernels), "fastbert", changed)
    functions = {"reference": twins, "cpu": compiled, "cuda": compiled}
    stem = kernels.__name__.rpartition(".")[2]
    if stem in OPS:
        by_triton = functools.partial(triton.function, stem)
        functions["triton"] = _namespace(twins, fakes, by_triton, "fastbert_triton", changed)
    return functions


def _namespace(
    twins: type, fakes: dict[str, Callable], kernel: Callable[[str], Callable], library: str, changed: tuple[str, ...]
) -> type:
    ops = {name: opaque(getattr(twins, name), kernel(name), fake, library, changed) for name, fake in fakes.items()}
    return type(library, (), {name: staticmethod(op) for name, op in ops.items()})


def opaque(
    twin: Callable, kernel: Callable, fake: Callable, library: str = "fastbert", changed: tuple[str, ...] = ()
) -> Callable:
    """One op of the twin's name and signature, as a function that goes around torch's dispatcher unnoticed.

    Once a kernel has pushed the dispatcher's code out of the caches, the way through it takes 0.1 ms, a fifth of a
    LayerNorm. Whatever looks at ops does see this one: compilers and tracers, modes (fake tensors, counters of
    operations), subclasses of Tensor, the transforms of torch.func and the profiler. It also resolves lazy negatives.
    """
    name = twin.__name__
    ops = _LIBRARIES[library]
    ops.define(name + torch.library.infer_schema(twin, mutates_args=changed), tags=(torch.Tag.pt2_compliant_tag,))
    ops.impl(name, kernel, "CPU")
    ops.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"{library}::{name}", fake, lib=ops)
    op = getattr(getattr(torch.ops, library), name).default

    @functools.wraps(twin)
    def call(*arguments: Any) -> Any:
        if _compiling() or _modes() or _tracer() is not None or _profiled() or _transformed():
            return op(*arguments)
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if x.is_neg():
                    return op(*arguments)
            elif isinstance(x, Tensor):
                return op(*arguments)
        if not _has_storage(arguments[0]):  # of batched gradients, which come first
            return op(*arguments)
        return kernel(*arguments)

    return call


def differentiated(*inputs: Tensor | None) -> bool:
    """Whether an op of these inputs must be noted for a derivative; if not, its Function is left out."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return True
    return _transformed() or forward_ad._current_level >= 0  # the Function refuses forward-mode derivatives


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
