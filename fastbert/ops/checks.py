"""What every op asks of its inputs, and the autocast rule: one wording for all."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """Under autocast a float32 activation is cast to the autocast dtype, as the products around the op would do."""
    if x.dtype != torch.float32 or not (x.is_cpu or torch.amp.is_autocast_available(x.device.type)):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


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


def check_activation(op: str, x: Tensor) -> None:
    """Raises unless x is a floating tensor [..., N] with N >= 1."""
    if not x.is_floating_point():
        raise TypeError(f"{op} takes float32, bfloat16 or float16 activations, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op} takes [..., N] with N >= 1, got shape {list(x.shape)}")


def check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    """Raises unless `vector` is [N] for x [..., N], on x's device, in float32 or x's dtype."""
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name} must have shape [{x.shape[-1]}], the last axis of x, got {list(vector.shape)}")
    if vector.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} must be float32 or x's dtype {x.dtype}, got {vector.dtype}")
    if vector.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {vector.device}")


def wide(x: Tensor) -> Tensor:
    """x in the dtype that statistics and sums are computed in: float32, or float64 where x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
