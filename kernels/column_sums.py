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
def sum_parts_kernel(scratch_ptr, first_ptr, second_ptr, third_ptr, parts, columns, P: tl.constexpr, C: tl.constexpr):
    """Output program_id(1), of at most three."""
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
    elif tl.program_id(1) == 1:
        tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=column < columns)
    else:
        tl.store(third_ptr + column, total.to(third_ptr.dtype.element_ty), mask=column < columns)


def sum_parts(scratch: Tensor, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> None:
    """scratch [1 to 3, parts, columns] -> first [columns], second and third where they are not None."""
    outputs, parts, columns = scratch.shape
    P, C = FEW if parts <= FEW[0] else MANY
    launch(
        sum_parts_kernel, (triton.cdiv(columns, C), outputs),
        scratch, first, first if second is None else second, first if third is None else third, parts, columns, P=P,
        C=C, num_warps=WARPS,
    )  # fmt: skip
