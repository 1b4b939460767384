"""What every op asks of its inputs, and the autocast rule: one wording for all."""

import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def autocast(x: Tensor) -> Tensor:
    """Under autocast a float32 activation is cast to the autocast dtype, as the products around the op would do."""
    if x.dtype != torch.float32:
        return x
    kind = "cpu" if x.is_cpu else x.device.type
    if not (kind == "cpu" or torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def without_autocast(function: Callable) -> Callable:
    """Decorator: the function computes in the dtypes it is given; its first argument says on which device."""

    @functools.wraps(function)
    def call(x: Tensor, *others: Any) -> Any:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):
            return function(x, *others)
        with torch.autocast(kind, enabled=False):
            return function(x, *others)

    return call


def kind(value: Any) -> str:
    """The name of its type, for messages: list, numpy.ndarray."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_tensor(name: str, x: Any) -> None:
    """Raises unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind(x)}; torch.as_tensor makes one of lists and arrays")


def check_activation(op: str, name: str, x: Tensor) -> None:
    """Raises unless x is a floating tensor [..., N] with N >= 1."""
    if not isinstance(x, Tensor):
        check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op} takes {name} in float32, bfloat16 or float16 (float64 on the reference backend), got {x.dtype}"
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op} takes {name} [..., N] with N >= 1, got shape {list(x.shape)}")


def check_vectors(x: Tensor, **vectors: Tensor) -> None:
    """Raises unless each is [N] for x [..., N], on x's device, in float32 or x's dtype."""
    shape, dtype, device = x.shape[-1:], x.dtype, x.device
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            check_tensor(name, vector)
        if vector.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, the last axis of x, got {list(vector.shape)}")
        own = vector.dtype
        if own != torch.float32 and own != dtype:
            raise TypeError(f"{name} must be float32 or x's dtype {dtype}, got {own}")
        if vector.device != device:
            raise ValueError(f"{name} must be on x's device {device}, got {vector.device}")


# Tensors are no numbers here: a look at one on a device would wait for it. Neither are True and False, which are
# arguments in the wrong place.


def as_float(name: str, value: Any) -> float:
    """The number as a float; TypeError for anything but a number."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {kind(value)} {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got {value!r}") from None


def as_int(name: str, value: Any) -> int:
    """The integer as an int; TypeError for anything else, floats included."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {kind(value)} {value!r}")
    return operator.index(value)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that statistics and sums are computed in: float32, or float64 where x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
