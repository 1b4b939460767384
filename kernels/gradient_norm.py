"""The L2 norm of many gradients together, and what they are to be multiplied by so that it is at most max_norm:

    norm = sqrt(sum of g * g),   factor = min(1, max_norm / (norm + 1e-6))     NaN stays in both

A program adds up the squares of CHUNK elements: each thread in float32, threads by a tree in float64. Then one program
adds up the chunks, in float64. All in an order that follows from the sizes alone, so the bits are the same every time.
Gradients are of any mixture of dtypes, one launch for each. Of one with `named` rows those alone count, and the others
are not read.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.launch import launch
from fastbert.kernels.tensor_table import MOST, TYPES, address, find_tensor, make_tables

CHUNK, BLOCK, WARPS = 16384, 2048, 8  # elements of a program, and those that it takes at a time: eight a thread
PARTS = 1024  # that are added up at a time


# ---- squares -------------------------------------------------------------------------------------------------------


@triton.jit
def load_counted(
    grad, named, first, end, first_row, first_column, columns, begin, NAMED: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Gradients [P, 8] as float32, from `first` [P, 1] on, 0 where they do not count or lie behind `end`.

    The chunk begins at `first_column` of `first_row`. ALIGNED: eight neighbours are of one row.
    """
    at = first + tl.arange(0, 8)[None, :]
    mask = at < end
    if NAMED:
        asked = first if ALIGNED else at
        row = first_row + (first_column + (asked - begin).to(tl.int32)) // columns
        mask = mask & (tl.load(named + row, mask=asked < end, other=0) != 0)
    return tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first_part"])
def squares_kernel(
    table_ptr, parts_ptr, first_part,
    DTYPE: tl.constexpr, NAMED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Table: first chunk, elements, grad, named, columns."""
    column_ptr, elements, begin = find_tensor(table_ptr, CHUNK, MOST)
    grad = address(column_ptr, 2, MOST, DTYPE, ALIGNED)
    named, columns, first_row, first_column = None, 1, 0, 0
    if NAMED:
        named = address(column_ptr, 3, MOST, tl.uint8, False)
        columns = tl.load(column_ptr + 4 * MOST)
        first_row, first_column = begin // columns, (begin % columns).to(tl.int32)
        columns = columns.to(tl.int32)
    whole = elements
    if ALIGNED:
        whole = elements // 8 * 8
    squares = tl.zeros([BLOCK // 8, 8], tl.float32)
    eights = tl.arange(0, BLOCK // 8)[:, None] * 8
    for first in range(begin, tl.minimum(begin + CHUNK, whole), BLOCK):
        g = load_counted(grad, named, first + eights, whole, first_row, first_column, columns, begin, NAMED, ALIGNED)
        squares = tl.fma(g, g, squares)
    if (whole < elements) & (elements <= begin + CHUNK):  # this chunk is the last, and some elements are left
        g = load_counted(grad, named, whole + eights, elements, first_row, first_column, columns, begin, NAMED, ALIGNED)
        squares = tl.fma(g, g, squares)
    squares = tl.sum(tl.sum(squares.to(tl.float64), 1), 0)
    tl.store(parts_ptr + first_part + tl.program_id(0), squares)


# ---- norm ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["parts"])
def norm_kernel(parts_ptr, norm_ptr, max_norm, parts, PARTS: tl.constexpr):
    squares = tl.zeros([PARTS], tl.float64)
    for first in range(0, parts, PARTS):
        at = first + tl.arange(0, PARTS)
        squares += tl.load(parts_ptr + at, mask=at < parts, other=0.0)
    total = tl.sqrt(tl.sum(squares, 0)).to(tl.float32)
    factor = max_norm / (total.to(tl.float64) + 1e-6)
    tl.store(norm_ptr, total)
    tl.store(norm_ptr + 1, tl.where(factor >= 1.0, 1.0, factor).to(tl.float32))


# ---- launcher ------------------------------------------------------------------------------------------------------


def gradient_norm(gradients: Sequence[tuple[Tensor, Tensor | None]], max_norm: float) -> Tensor:
    """As `fastbert.backends.gradient_norm.gradient_norm`."""
    read = [(grad.resolve_neg().contiguous(), named) for grad, named in gradients]
    kinds: dict[tuple, list[tuple[Tensor, Tensor | None]]] = {}
    for grad, named in read:
        if grad.numel():
            is_aligned = grad.data_ptr() % 16 == 0 and (named is None or grad.numel() // len(named) % 8 == 0)
            kinds.setdefault((TYPES[grad.dtype], named is not None, is_aligned), []).append((grad, named))
    launches = [(kind, its[i : i + MOST]) for kind, its in kinds.items() for i in range(0, len(its), MOST)]
    device = read[0][0].device
    tables = make_tables([[_fields(*each) for each in its] for _, its in launches], CHUNK, device) if launches else []
    parts = torch.empty(sum(chunks for _, chunks in tables), dtype=torch.float64, device=device)
    first = 0
    for ((dtype, is_named, is_aligned), _), (table, chunks) in zip(launches, tables, strict=True):
        launch(
            squares_kernel, (chunks,), table, parts, first, DTYPE=dtype, NAMED=is_named, ALIGNED=is_aligned,
            CHUNK=CHUNK, BLOCK=BLOCK, MOST=MOST, num_warps=WARPS,
        )  # fmt: skip
        first += chunks
    norm = torch.empty(2, dtype=torch.float32, device=device)
    launch(norm_kernel, (1,), parts, norm, max_norm, first, PARTS=PARTS, num_warps=WARPS)
    return norm


def _fields(grad: Tensor, named: Tensor | None) -> tuple[int, ...]:
    columns = 1 if named is None else grad.numel() // max(1, len(named))
    return grad.numel(), grad.data_ptr(), 0 if named is None else named.data_ptr(), columns
