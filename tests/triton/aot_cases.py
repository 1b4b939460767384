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


CASES = {function.__name__: function for function in (gelu, cross_entropy)}
