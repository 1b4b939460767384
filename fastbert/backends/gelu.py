"""gelu by the C++ modules; the contract is in `fastbert.ops.gelu`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, contiguous, launcher, rows_and_columns


def gelu_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x, bias = x.contiguous(), contiguous(bias)
    y = torch.empty_like(x)
    rows, columns = rows_and_columns(x)
    module, launch = launcher(x, rows * columns)
    module.gelu_forward(
        x.data_ptr(), address(bias), approximate == "tanh",
        y.data_ptr(), rows, columns, DTYPES[x.dtype],
        DTYPES[(x if bias is None else bias).dtype], launch,
    )  # fmt: skip
    return y


def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    dy, x, bias = dy.contiguous(), x.contiguous(), contiguous(bias)
    rows, columns = rows_and_columns(x)
    module, launch = launcher(x, rows * columns)
    dx = torch.empty_like(x)
    if bias is None:
        dbias, scratch = x.new_empty(0), None
    else:
        dbias = torch.empty_like(bias)
        scratch = x.new_empty(module.gelu_scratch(rows, columns), dtype=torch.float32)
    module.gelu_backward(
        dy.data_ptr(), x.data_ptr(), address(bias), approximate == "tanh",
        dx.data_ptr(), 0 if bias is None else dbias.data_ptr(), address(scratch), rows, columns, DTYPES[x.dtype],
        DTYPES[(x if bias is None else bias).dtype], launch,
    )  # fmt: skip
    return dx, dbias
