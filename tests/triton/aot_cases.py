"""What aot.py compiles: for each stem a function that calls its launchers once for every width class and option that
changes the code, on tensors of any contents, after naming the case. A new kernel is one function here and its lines in
budget.csv.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

ROWS = 4096


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def gelu(kernels: ModuleType, dtype: torch.dtype, name: Callable) -> None:
    for columns in (81, 3072):
        x, bias = empty(dtype, ROWS, columns), empty(dtype, columns)
        for form in ("none", "tanh") if columns == 3072 else ("none",):
            name(columns, form)
            kernels.gelu_forward(x, bias, form)
            kernels.gelu_backward(x, x, bias, form)
    name("without bias")
    kernels.gelu_forward(x, None, "none")
    kernels.gelu_backward(x, x, None, "none")


def cross_entropy(kernels: ModuleType, dtype: torch.dtype, name: Callable) -> None:
    labels, each = empty(torch.int64, 8), empty(torch.float32, 8)
    for columns, stride in ((81, 81), (30_522, 30_522), (30_522, 30_528)):
        name(columns, "of", stride)
        logits = empty(dtype, 8, stride)[:, :columns]
        kernels.cross_entropy_forward(logits, labels, -100)
        kernels.cross_entropy_backward(each, logits, labels, each, each, -100)


def layer_norm(kernels: ModuleType, dtype: torch.dtype, name: Callable) -> None:
    seed = empty(torch.int64, 1)
    for columns in (24, 768, 1024, 4096, 8192, 20_000):
        x, weight, each = empty(dtype, ROWS, columns), empty(torch.float32, columns), empty(torch.float32, ROWS)
        name(columns)
        kernels.layer_norm_forward(x, x, weight, weight, 1e-5, 6554, seed)
        kernels.layer_norm_backward(x, x, weight, each, each, 6554, seed)
        if columns == 768:
            name(columns, "without dropout")
            kernels.layer_norm(x, None, weight, weight, 1e-5, 0, None)
            kernels.layer_norm_backward(x, x, weight, each, each, 0, None)


def dropout(kernels: ModuleType, dtype: torch.dtype, name: Callable) -> None:
    for columns in (81, 768):
        name(columns)
        kernels.dropout(empty(dtype, ROWS, columns), 6554, empty(torch.int64, 1))


CASES = {function.__name__: function for function in (gelu, layer_norm, dropout, cross_entropy)}
