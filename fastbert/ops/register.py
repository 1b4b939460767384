"""How ops are registered with torch."""

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


def register(function: Callable) -> Callable:
    """Decorator: an opaque op `fastbert::<name>` that changes none of its inputs, for every device.

    What `torch.library.custom_op` makes, less its look for aliases at every call, which takes longer than the rest of
    a call (12 microseconds of 17); `torch.library.opcheck` looks for them in the tests.

    The function that is returned goes around torch's dispatcher where nobody would notice: once a kernel has pushed the
    dispatcher's code out of the caches, the way through it takes 0.1 ms, a fifth of a LayerNorm. Whatever looks at ops
    does see this one: compilers and tracers, modes (fake tensors, counters of operations), subclasses of Tensor and the
    profiler.
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
            if isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not Parameter:
                return op(*arguments)
        return function(*arguments)

    return call


def fake(name: str) -> Callable:
    """Decorator: says the shapes and dtypes of the results of `fastbert::<name>`, for torch.compile."""
    return torch.library.register_fake(f"fastbert::{name}", lib=_library)
