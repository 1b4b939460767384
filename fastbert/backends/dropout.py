"""dropout by the C++ modules; the contract is in `fastbert.ops.dropout`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, launcher, rows_of


def dropout(x: Tensor, t: int, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = x.shape[-1]
    module, launch = launcher(x.numel())
    module.dropout(
        x.data_ptr(), t, seed.data_ptr(), y.data_ptr(), rows_of(x, columns), columns, DTYPES[x.dtype], launch
    )
    return y
