"""layer_norm by the C++ modules; the contract is in `fastbert.ops.layer_norm`."""

from typing import Any

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, launcher, rows_and_columns


def layer_norm(x: Tensor, *others: Any) -> Tensor:
    x = _aligned(x)
    y = torch.empty_like(x)
    _forward((y.data_ptr(), 0, 0, 0), x, *others)
    return y


def layer_norm_forward(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _aligned(x)
    is_changed = x_bias is not None or residual is not None or others[3] > 0
    y = torch.empty_like(x)
    z = torch.empty_like(x) if is_changed else x.new_empty(0)
    leading = x.shape[:-1]  # spelled out: a size in one piece takes a microsecond more
    mean = x.new_empty(*leading, dtype=torch.float32) if leading else x.new_empty((), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    results = y.data_ptr(), z.data_ptr() if is_changed else 0, mean.data_ptr(), rstd.data_ptr()
    _forward(results, x, x_bias, residual, *others)
    return y, z, mean, rstd


def _forward(
    results: tuple[int, ...], x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, t: int, seed: Tensor | None,
) -> None:  # fmt: skip
    x_bias, residual = None if x_bias is None else _aligned(x_bias), None if residual is None else _aligned(residual)
    weight, bias = _aligned(weight), _aligned(bias)
    rows, columns = rows_and_columns(x)
    module, launch = launcher(x, rows * columns)
    module.layer_norm_forward(
        x.data_ptr(), address(x_bias), address(residual), weight.data_ptr(), bias.data_ptr(), eps, t, address(seed),
        *results, rows, columns, DTYPES[x.dtype], DTYPES[weight.dtype], launch,
    )  # fmt: skip


def layer_norm_backward(
    dy: Tensor, dy2: Tensor | None, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, t: int, seed: Tensor | None,
    with_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, dy2, z, weight = _aligned(dy), None if dy2 is None else _aligned(dy2), _aligned(z), _aligned(weight)
    rows, columns = rows_and_columns(z)
    module, launch = launcher(z, rows * columns)
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if t > 0 else z.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    dx_bias = torch.empty_like(weight) if with_x_bias else weight.new_empty(0)
    scratch = z.new_empty(module.layer_norm_scratch(rows, columns, with_x_bias), dtype=torch.float32)
    module.layer_norm_backward(
        dy.data_ptr(), address(dy2), z.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(), t,
        address(seed), dz.data_ptr(), dx.data_ptr() if t > 0 else 0, dweight.data_ptr(), dbias.data_ptr(),
        dx_bias.data_ptr() if with_x_bias else 0, scratch.data_ptr(), rows, columns, DTYPES[z.dtype],
        DTYPES[weight.dtype], launch,
    )  # fmt: skip
    return dz, dx, dweight, dbias, dx_bias


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous, from a multiple of 16 bytes on: a GPU adds up rows that begin elsewhere in another order."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
