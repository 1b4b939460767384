"""The product of a linear layer, forward and backward.

    y = x @ weight.T + bias,   dx = dy @ weight,   dweight = dy.T @ x,   dbias = column sums of dy

x is [..., K], weight [N, K], bias [N], y [..., N]; backward saves x for dweight and weight for dx, each where it is
wanted. Sums are in float32 (float64 for float64 inputs), and y and dx in x's dtype, the other gradients in that of
what they belong to: beside a bfloat16 x, float32 weights are taken as they are and their gradients not rounded, but by
the libraries that multiply bfloat16 by bfloat16. Which library multiplies is chosen in `fastbert.backends.linear`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.backends import linear as kernels
from fastbert.ops.checks import autocast, wide, without_autocast
from fastbert.ops.register import differentiated, once_differentiable, opaque, register


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 and bfloat16 on a CPU by the library that `use_linear` describes.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N]; under autocast in the autocast dtype.

    Raises:
        ValueError: FASTBERT_LINEAR names no library, or one that this torch lacks.
        RuntimeError: shapes, dtypes or devices that `F.linear` refuses.
        TypeError: no tensors.
    """
    library = kernels.library_for(x, weight, bias)
    if library == "torch":
        return F.linear(x, weight, bias)
    rows = autocast(x).reshape(-1, x.shape[-1])
    if kernels.multiplies_rounded(library):
        weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    chosen = "reference" if library == "widened" else "cpu"
    if differentiated(rows, weight, bias):
        y = _Linear.apply(chosen, rows, weight, bias, library)
    else:
        y = functions[chosen].linear_forward(rows, weight, bias, library)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def padded_linear(x: Tensor, weight: Tensor, bias: Tensor, padded_weight: Tensor, padded_bias: Tensor) -> Tensor:
    """`linear` by a product of more columns than are wanted, for a faster one, as a view of its result.

    Args:
        x: [M, K].
        weight, bias: [V, K] and [V] of x's dtype, which take the gradients.
        padded_weight, padded_bias: [W, K] and [W], of which those are the first V rows; the others are 0.

    Returns:
        [M, V], rows W apart. A gradient that comes as the first V columns of one [M, W] with zeros behind them, as that
        of `fastbert.cross_entropy` does, is multiplied as it lies.

    Raises:
        ValueError: shapes, strides or a dtype of another kind.
    """
    for name, part, whole in (("weight", weight, padded_weight), ("bias", bias, padded_bias)):
        if part.shape != whole[: len(part)].shape or part.stride() != whole.stride() or part.dtype != x.dtype:
            raise ValueError(
                f"{name} must be the first rows of padded_{name}, in x's dtype {x.dtype}: got {part.dtype} "
                f"{list(part.shape)} of {list(whole.shape)}"
            )
    return _PaddedLinear.apply(x, weight, bias, padded_weight, padded_bias)


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests; whatever the library."""

    @staticmethod
    @without_autocast
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
        return F.linear(wide(x), wide(weight), None if bias is None else wide(bias)).to(x.dtype)

    @staticmethod
    @without_autocast
    def linear_backward(
        dy: Tensor, x: Tensor | None, weight: Tensor | None, weight_dtype: torch.dtype,
        bias_dtype: torch.dtype | None, library: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Empty where it is not wanted: dx without a weight, dweight without x, dbias without a dtype for it."""
        rows = wide(dy)
        dx = dy.new_empty(0) if weight is None else (rows @ wide(weight)).to(dy.dtype)
        dweight = dy.new_empty(0) if x is None else (rows.t() @ wide(x)).to(weight_dtype)
        dbias = dy.new_empty(0) if bias_dtype is None else dy.sum(0, dtype=bias_dtype)
        return dx, dweight, dbias


functions = register(
    reference,
    kernels,
    linear_forward=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    linear_backward=lambda dy, x, weight, weight_dtype, bias_dtype, *_: (
        dy.new_empty(0) if weight is None else dy.new_empty(dy.shape[0], weight.shape[1]),
        dy.new_empty(0) if x is None else dy.new_empty(dy.shape[1], x.shape[1], dtype=weight_dtype),
        dy.new_empty(0) if bias_dtype is None else dy.new_empty(dy.shape[1], dtype=bias_dtype),
    ),
)
packed_linear = opaque(
    kernels.packed_linear, kernels.packed_linear, lambda x, packed, bias, columns, depth: x.new_empty(len(x), columns)
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, x, weight, bias, library):
        _, dx, dweight, dbias, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if dweight else None, weight if dx else None)
        ctx.options = chosen, weight.dtype, bias.dtype if dbias else None, library
        return functions[chosen].linear_forward(x, weight, bias, library)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        chosen, *options = ctx.options
        gradients = functions[chosen].linear_backward(dy, x, weight, *options)
        wanted = zip(gradients, ctx.needs_input_grad[1:4], strict=True)
        return None, *(gradient if needed else None for gradient, needed in wanted), None


class _PaddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, padded_weight, padded_bias):
        ctx.save_for_backward(x, padded_weight)
        return F.linear(x, padded_weight, padded_bias)[:, : len(weight)]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, padded_weight = ctx.saved_tensors
        rows, columns, width = *dy.shape, len(padded_weight)
        end = (dy.storage_offset() + rows * width) * dy.element_size()
        is_padded = dy.stride() == (width, 1) and dy.untyped_storage().nbytes() >= end
        wide = dy.as_strided((rows, width), (width, 1)) if is_padded else F.pad(dy, (0, width - columns))
        return wide @ padded_weight, (wide.t() @ x)[:columns], wide.sum(0)[:columns], None, None
