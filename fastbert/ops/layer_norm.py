"""LayerNorm with the dropout and the residual before it, forward and backward.

    z = residual + dropout(x + x_bias)             rounded to x's dtype
    y = (z - mean(z)) * rstd(z) * weight + bias    rstd = 1 / sqrt(var(z) + eps), biased variance of the rounded z

x, residual, y, z are [..., N], weight, bias and x_bias [N], mean and rstd [...]. x_bias is the bias of the linear layer
in front, whose product is x: added here it costs no pass over memory, and neither does its gradient. Statistics and
sums are float32 (float64 for float64 inputs). Backward saves z (x itself where nothing was added or dropped), mean and
rstd, never the mask, which it draws again. dy is the sum of the gradients of y's two uses where y has two:

    h = (z - mean) * rstd,   g = dy * weight
    dz = rstd * (g - mean(g) - h * mean(g * h)),   dx = dropout'(dz)
    dweight = sum(dy * h),   dbias = sum(dy),   dx_bias = sum(dx)

Element (row, column) is dropped by counter `(column // 8, row, 0, 0)`, 16-bit lane `column % 8` (see `philox`).
Source: Ba, Kiros and Hinton, "Layer normalization" (2016).
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from fastbert.backends import layer_norm as kernels
from fastbert.backends import pick, requested
from fastbert.ops import philox
from fastbert.ops.checks import FLOATS, as_float, autocast, check_activation, check_tensor, check_vectors, wide
from fastbert.ops.dropout import dropped
from fastbert.ops.register import differentiated, once_differentiable, register


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12, *, backend: str | None = None) -> Tensor:
    """LayerNorm over the last axis.

    Args:
        x: [..., N] float32, bfloat16 or float16 (float64 on the reference backend). Under autocast a float32 x is cast
            to the autocast dtype first.
        weight, bias: [N], float32 or x's dtype.
        eps: added to the variance, finite and at least 0; BERT's own default.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or eps that does not fit.
        RuntimeError: an explicit backend that cannot run here.
    """
    check_activation("layer_norm", "x", x)
    return _run(backend, False, autocast(x), None, None, weight, bias, eps, 0, None)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    *,
    x_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`layer_norm(residual + dropout(x + x_bias))` in one pass over memory: how a post-norm transformer block ends.

    Args:
        x: [..., N] float32, bfloat16 or float16 (float64 on the reference backend). Under autocast a float32 x is cast
            to the autocast dtype first.
        residual: [..., N], cast to x's dtype; None adds nothing.
        weight, bias: [N], float32 or x's dtype.
        eps: added to the variance, finite and at least 0; BERT's own default.
        dropout_p: probability that an element of x is dropped; the others are scaled by `1 / (1 - dropout_p)`.
            Rounded to a multiple of 1/65536; above 0 it is at least that, and below 1 at most 65535/65536.
        seed: an int, or int64 [1] on x's device; None draws one from torch's default generator.
        x_bias: [N], cast to the weight's dtype: the bias of the linear layer whose product x is. None adds nothing.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device, probability, seed or eps that does not fit.
        RuntimeError: an explicit backend that cannot run here.
    """
    return _dropped_and_added(backend, False, x, x_bias, residual, weight, bias, eps, dropout_p, seed)


def dropout_add_layer_norm_twice(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    *,
    x_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`dropout_add_layer_norm` for a result with two uses, such as a product and the next residual.

    Backward then adds the two gradients in its own pass; autograd would need one more over memory.

    Args, Raises: as `dropout_add_layer_norm`.

    Returns:
        The result twice, as two tensors of the same memory, one for each use: do not change either in place.
    """
    return _dropped_and_added(backend, True, x, x_bias, residual, weight, bias, eps, dropout_p, seed)


def _dropped_and_added(
    backend: str | None, twice: bool, x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor,
    bias: Tensor, eps: float, dropout_p: float, seed: Tensor | int | None,
) -> Any:  # fmt: skip
    check_activation("layer_norm", "x", x)
    x = autocast(x)
    if residual is not None:
        check_tensor("residual", residual)
        if residual.dtype not in FLOATS:
            raise TypeError(f"residual must be a floating tensor, which is cast to x's dtype, got {residual.dtype}")
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"residual must have x's shape {list(x.shape)} and device {x.device}, got {list(residual.shape)} on "
                f"{residual.device}"
            )
        residual = residual.to(x.dtype)
    if x_bias is not None:
        check_vectors(x, x_bias=x_bias)
        check_tensor("weight", weight)
        x_bias = x_bias.to(weight.dtype)
    t = philox.threshold(dropout_p)
    seed = philox.resolve_seed(seed, t, x.device)
    return _run(backend, twice, x, x_bias, residual, weight, bias, eps, t, seed)


def _run(
    backend: str | None, twice: bool, x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor,
    bias: Tensor, eps: float, *dropping: Any,
) -> Any:  # fmt: skip
    """y, or where it is wanted twice, a pair. Weight, bias and eps are yet to be checked; `dropping` is t and seed."""
    check_vectors(x, weight=weight, bias=bias)
    if weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")
    eps = as_float("eps", eps)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is added to the variance: expected a finite number of at least 0, got {eps}")
    chosen = pick("layer_norm", requested(backend), x)
    arguments = x, x_bias, residual, weight, bias, eps, *dropping
    if differentiated(x, x_bias, residual, weight, bias):
        return _LayerNorm.apply(chosen, twice, *arguments)
    y = functions[chosen].layer_norm(*arguments)
    return (y, y) if twice else y


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def layer_norm_forward(
        x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        z = wide(x)
        if x_bias is not None:
            z = z + x_bias
        if t > 0:
            z = dropped(z, t, seed)
        if residual is not None:
            z = z + residual
        stored = z.to(x.dtype)
        z = wide(stored)
        # statistics
        mean = z.mean(-1)
        centred = z - mean.unsqueeze(-1)
        rstd = torch.rsqrt(centred.square().mean(-1) + eps)
        # normalize, affine
        y = (centred * rstd.unsqueeze(-1) * weight + bias).to(x.dtype)
        unchanged = x_bias is None and residual is None and t == 0
        return y.contiguous(), x.new_empty(0) if unchanged else stored.contiguous(), mean, rstd

    @staticmethod
    def layer_norm(*arguments: Any) -> Tensor:
        """y alone, where no derivative is wanted: the kernels then write nothing else."""
        return reference.layer_norm_forward(*arguments)[0]

    @staticmethod
    def layer_norm_backward(
        dy: Tensor, dy2: Tensor | None, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, t: int,
        seed: Tensor | None, with_x_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """dy2 is the gradient of y's second use; dx is empty where nothing was dropped, since it is dz then."""
        d = wide(dy)
        if dy2 is not None:
            d = d + dy2
        # statistics
        rstd = rstd.unsqueeze(-1)
        h = (wide(z) - mean.unsqueeze(-1)) * rstd
        g = d * weight
        # normalize
        dz = rstd * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
        dx = dz if t == 0 else dropped(dz, t, seed)
        # affine
        dweight, dbias, dx_bias = (
            each.reshape(-1, z.shape[-1]).sum(0).to(weight.dtype) for each in (d * h, d, dx)
        )  # fmt: skip
        dx = z.new_empty(0) if t == 0 else dx.to(z.dtype).contiguous()
        return dz.to(z.dtype).contiguous(), dx, dweight, dbias, dx_bias if with_x_bias else weight.new_empty(0)


reference.layer_norm.__signature__ = inspect.signature(reference.layer_norm_forward).replace(return_annotation=Tensor)


def _fake_forward(x, x_bias, residual, weight, bias, eps, t, *_):
    z = x.new_empty(0) if x_bias is None and residual is None and t == 0 else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return x.new_empty(x.shape), z, mean, rstd


def _fake_backward(dy, dy2, z, weight, mean, rstd, t, seed, with_x_bias):
    dx = z.new_empty(0) if t == 0 else z.new_empty(z.shape)
    sums = (weight.new_empty(weight.shape if wanted else 0) for wanted in (True, True, with_x_bias))
    return z.new_empty(z.shape), dx, *sums


functions = register(
    reference,
    kernels,
    layer_norm=lambda x, *_: x.new_empty(x.shape),
    layer_norm_forward=_fake_forward,
    layer_norm_backward=_fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, twice, *arguments):
        x, x_bias, residual, weight, _, _, t, seed = arguments
        y, z, mean, rstd = functions[chosen].layer_norm_forward(*arguments)
        is_x = x_bias is None and residual is None and t == 0
        ctx.save_for_backward(x if is_x else z, weight, mean, rstd, seed)
        ctx.options = chosen, t, residual is not None, x_bias is not None and ctx.needs_input_grad[3]
        if not twice:
            return y
        ctx.set_materialize_grads(False)  # an output that is not used has None, not zeros to be added
        return y, y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dy2=None):
        *saved, seed = ctx.saved_tensors
        chosen, t, has_residual, with_x_bias = ctx.options
        if dy is None:
            dy, dy2 = dy2, None
        if dy is None:
            return (None,) * 10
        dz, dx, dweight, dbias, dx_bias = functions[chosen].layer_norm_backward(dy, dy2, *saved, t, seed, with_x_bias)
        gradients = dx if t > 0 else dz, dx_bias if with_x_bias else None, dz if has_residual else None, dweight, dbias
        return None, None, *gradients, None, None, None
