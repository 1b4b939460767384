"""GELU with the bias of the linear layer before it, forward and backward.

    y = g(x + bias),   g(u) = u * Phi(u)                                     approximate="none"
                       g(u) = u * sigmoid(2 * sqrt(2/pi) * (u + 0.044715 u^3))      approximate="tanh"

x is [..., N], bias [N]; backward saves x and bias and returns dx and the column sums dbias. The sum x + bias and g are
computed in float32 (float64 for float64 inputs) whatever the dtype of x; neither form cancels in the tails.
Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016).
"""

import math

import torch
from torch import Tensor

from fastbert.backends import gelu as kernels
from fastbert.backends import pick, requested
from fastbert.ops.checks import autocast, check_activation, check_vectors, wide
from fastbert.ops.register import differentiated, once_differentiable, register


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU of `x + bias`.

    Args:
        x: [..., N] float32, bfloat16 or float16 (float64 on the reference backend). Under autocast a float32 x is cast
            to the autocast dtype first.
        bias: [N], float32 or x's dtype; None adds nothing.
        approximate: "none" for the exact form (erf), "tanh" for the tanh form, as `torch.nn.functional.gelu` says it.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: unknown `approximate`, or a bias of another shape or device.
        TypeError: no tensor, or a dtype that is not supported.
        RuntimeError: an explicit backend that cannot run here.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' (erf) or 'tanh', got {approximate!r}")
    check_activation("gelu", "x", x)
    x = autocast(x)
    if bias is not None:
        check_vectors(x, bias=bias)
    chosen = pick("gelu", requested(backend), x)
    if differentiated(x, bias):
        return _Gelu.apply(x, bias, approximate, chosen)
    return functions[chosen].gelu_forward(x, bias, approximate)


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def gelu_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        u = wide(x) if bias is None else wide(x) + bias
        y = u * _gate(u, approximate)
        return torch.where(u == -torch.inf, 0.0, y).to(x.dtype).contiguous()

    @staticmethod
    def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
        u = wide(x) if bias is None else wide(x) + bias
        gate = _gate(u, approximate)
        if approximate == "tanh":
            slope = u * gate * (1 - gate) * (2 * math.sqrt(2 / math.pi)) * (1 + 3 * 0.044715 * u * u)
            slope = torch.where((gate == 0) | (gate == 1), 0.0, slope)
        else:
            slope = torch.where(u.isinf(), 0.0, u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi))
        dx = wide(dy) * (gate + slope)
        dbias = x.new_empty(0) if bias is None else dx.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
        return dx.to(x.dtype).contiguous(), dbias


def _gate(u: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u))
    return 0.5 * torch.erfc(u * -math.sqrt(0.5))


functions = register(
    reference,
    kernels,
    gelu_forward=lambda x, *_: x.new_empty(x.shape),
    gelu_backward=lambda dy, x, bias, *_: (
        x.new_empty(x.shape),
        torch.empty_like(x.new_empty(0) if bias is None else bias),
    ),
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate, chosen):
        ctx.save_for_backward(x, bias)
        ctx.options = approximate, chosen
        return functions[chosen].gelu_forward(x, bias, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        approximate, chosen = ctx.options
        dx, dbias = functions[chosen].gelu_backward(dy, x, bias, approximate)
        return dx, None if bias is None else dbias, None, None
