"""The second step of column sums over rows: programs leave the sums of their rows, parts, in scratch [outputs, parts,
columns] float32, and `sum_parts` adds the parts up, always in the same order.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.launch import launch

WARPS = 8
# Parts and columns that a program adds up at a time. 16 columns are 64 bytes of each part, two sectors.
FEW, MANY = (32, 128), (512, 16)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(scratch_ptr, first_ptr, second_ptr, parts, columns, P: tl.constexpr, C: tl.constexpr):
    """Output program_id(1), of at most two."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    scratch_ptr += tl.program_id(1) * parts.to(tl.int64) * columns
    sums = tl.zeros([P, C], tl.float32)
    for first in tl.range(0, parts, P):
        part = first + tl.arange(0, P)[:, None]
        mask = (part < parts) & (column[None, :] < columns)
        sums += tl.load(scratch_ptr + part.to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=column < columns)
    else:
        tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=column < columns)


def sum_parts(scratch: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """scratch [1 or 2, parts, columns] -> first [columns], and second where it is not None."""
    outputs, parts, columns = scratch.shape
    P, C = FEW if parts <= FEW[0] else MANY
    launch(
        sum_parts_kernel, (triton.cdiv(columns, C), outputs),
        scratch, first, first if second is None else second, parts, columns, P=P, C=C, num_warps=WARPS,
    )  # fmt: skip
