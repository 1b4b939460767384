"""The C++ module's own products of linear layers, beside torch's libraries; see `csrc/cpu/linear.cpp`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, contiguous, launcher, module


def linear_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, shape: tuple[int, int] | None = None
) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N] in `dtype`; all in float32 or bfloat16, M, N, K >= 1.

    With `shape`, the weight's, `weight` is what `linear_packed` made of it.
    """
    x, bias = _along(x), contiguous(bias)
    weight = weight if shape else _along(weight)
    (columns, depth), (row, column) = shape or weight.shape, (0, 0) if shape else weight.stride()
    if min(*x.shape, columns) == 0 or x.shape[1] != depth:
        raise ValueError(f"x [M, K] @ weight [N, K].T: all at least 1, got {list(x.shape)} and [{columns}, {depth}]")
    y = x.new_empty(x.shape[0], columns, dtype=dtype)
    module.linear_product(
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), *x.stride(), column, row, x.shape[0], columns,
        depth, DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype],
        DTYPES[torch.float32 if bias is None else bias.dtype], shape is not None, torch.get_num_threads(),
    )  # fmt: skip
    return y


def linear_packed(weight: Tensor) -> Tensor:
    """weight [N, K] in float32 or bfloat16 -> float32 numbers in the order in which `linear_product` reads them."""
    weight = _along(weight)
    columns, depth = weight.shape
    packed = weight.new_empty(module.linear_packed(depth, columns), dtype=torch.float32)
    _, launch = launcher(weight, weight.numel())
    module.linear_pack(
        weight.data_ptr(), packed.data_ptr(), weight.stride(1), weight.stride(0), columns, depth,
        DTYPES[weight.dtype], launch,
    )  # fmt: skip
    return packed


def transposed(x: Tensor) -> Tensor:
    """x [M, N] float32, contiguous along N -> [N, M] contiguous."""
    if x.dtype != torch.float32:
        raise TypeError(f"the kernel moves words of four bytes, float32, got {x.dtype}")
    y = x.new_empty(x.shape[1], x.shape[0])
    _, launch = launcher(x, x.numel())
    module.transpose(x.data_ptr(), y.data_ptr(), *x.shape, x.stride(0), launch)
    return y


def _along(x: Tensor) -> Tensor:
    """A matrix as the kernel takes it: elements of its rows or of its columns side by side."""
    return x if 1 in x.stride() else x.contiguous()
