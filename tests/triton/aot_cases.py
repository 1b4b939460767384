"""What aot.py compiles: for each stem a function that calls its launchers once for every width class and option that
changes the code, on tensors of any contents, after naming the case. A new kernel is one function here and its lines in
budget.csv.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import triton
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
    for columns in (24, 81, 312, 768, 1024, 2048, 4096, 8192, 20_000):
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


def attention(kernels: ModuleType, dtype: torch.dtype, name: Callable) -> None:
    target = triton.runtime.driver.active.get_current_target()
    kernels.target_of = lambda device: "amd" if target.backend == "hip" else f"sm_{target.arch}"
    cu_seqlens, seed = empty(torch.int32, 9), empty(torch.int64, 1)
    window = [64, 64]

    def both(size: int, longest: int, t: int, window: list[int] | None) -> None:
        qkv = empty(dtype, ROWS, 3, 12, size)
        out, lse = empty(dtype, ROWS, 12, size), empty(torch.float32, ROWS, 12)
        given = *qkv.unbind(1), cu_seqlens, longest, 0.125, t, seed if t else None, False, window
        kernels.attention_forward(*given)
        kernels.attention_backward(out, *given[:3], out, lse, *given[3:])

    for size in (32, 64, 128):
        name(size, "dropout window")
        if dtype != torch.float16:
            both(size, 512, 26, window)
    if dtype != torch.float32:
        name(64, "dropout")
        both(64, 512, 26, None)
        name(32, "short dropout")
        both(32, 128, 26, None)
        name(64, "short dropout")
        both(64, 128, 26, None)
        name(64)
        both(64, 512, 0, None)


CASES = {function.__name__: function for function in (gelu, layer_norm, dropout, cross_entropy, attention)}
