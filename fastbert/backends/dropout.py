"""dropout by the C++ modules; the contract is in `fastbert.ops.dropout`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, launcher, rows_and_columns


def dropout(x: Tensor, t: int, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, columns = rows_and_columns(x)
    module, launch = launcher(x, rows * columns)
    module.dropout(x.data_ptr(), t, seed.data_ptr(), y.data_ptr(), rows, columns, DTYPES[x.dtype], launch)
    return y
