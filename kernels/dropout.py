"""Dropout of [T, H]: y = x * scale where an element is kept, 0 where it is dropped. Which are kept follows from the
seed and from where they stand, so that the gradient is this very function of dy.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.launch import launch
from fastbert.kernels.philox import ROW_BITS, bound, keep_row, scale

TILE = 2048  # elements that a program has
MOST_COLUMNS = 512  # of them side by side
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def dropout_kernel(x_ptr, bound, scale, zero, seed_ptr, y_ptr, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """Both directions: a tile of R rows and C columns. `zero` is 0.0, as in layer_norm.py."""
    column_blocks = tl.cdiv(columns, C)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * R + tl.arange(0, R)[:, None]
    first = tl.program_id(0) % column_blocks * C
    column = first + tl.arange(0, C)[None, :]
    at, mask = row * columns + column, (row < rows) & (column < columns)
    x = tl.load(x_ptr + at, mask=mask)
    keep = keep_row(first // 8 + tl.arange(0, C // 8)[None, :], row, tl.load(seed_ptr), bound)
    tl.store(y_ptr + at, tl.where(keep, x.to(tl.float32) * scale, zero).to(x.dtype), mask=mask)


# ---- launcher ------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, t: int, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    columns = x.shape[-1]
    rows = x.numel() // columns
    C = min(MOST_COLUMNS, max(8, triton.next_power_of_2(columns)))
    R = min(TILE // C, triton.next_power_of_2(rows))
    launch(
        dropout_kernel, (triton.cdiv(columns, C) * triton.cdiv(rows, R),),
        x, bound(t, ROW_BITS), scale(t, ROW_BITS), 0.0, seed, y, rows, columns, R=R, C=C, num_warps=WARPS,
    )  # fmt: skip
    return y
