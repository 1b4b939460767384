"""What attention's kernels share: which rows a program takes, which blocks of the others it walks through, and tiles.

A program takes ROWS rows of one head of one sequence, queries or, for dk and dv, keys, and walks through the rows of
the other kind in blocks of BLOCK. First come the blocks that all its rows see whole, in which nothing is compared; then
those at the two edges of the window and at the sequence's end. Others are not looked at:

    others    0 . . first [edge] full_first [whole] [whole] full_last [edge] last . . length

The grid has programs for all tiles of `max_seqlen` rows, and those behind a sequence's end read two numbers and return:
nothing waits for the device, and a batch whose sequences are shorter takes less time than one of full length (a
prototype on an H200: 17 us instead of 20 for 64 sequences of 32 to 128 tokens), while a list of work would
need a kernel of its own.
"""

import triton
import triton.language as tl

from fastbert.kernels import faults

# ---- which rows ------------------------------------------------------------------------------------------------------


@triton.jit
def work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, ROWS: tl.constexpr, ALL: tl.constexpr):
    """The head, the first row, the sequence's first token and its length in tokens.

    The length is 0 where there is nothing to do: behind the sequence's end, or where cu_seqlens cannot be used. ALL:
    tokens of no sequence are reported too, whose results nobody writes; once is enough, and costs a kernel registers.
    """
    place = tl.program_id(0)
    tiles = (max_seqlen + ROWS - 1) // ROWS
    row = place % tiles * ROWS
    head = place // tiles % heads
    sequence = place // tiles // heads
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    length = end - start
    wrong = (start < 0) | (length < 0) | (length > max_seqlen) | (end > tokens)
    reported = wrong
    if ALL:
        last = tl.num_programs(0) // (tiles * heads) - 1
        reported = wrong | ((sequence == 0) & (start != 0)) | ((sequence == last) & (end != tokens))
    faults.raise_fault(faults_ptr, faults.SEQUENCE, sequence, reported & (row == 0) & (head == 0))
    return head, row, start.to(tl.int64), tl.where(wrong | (row >= length), 0, length)


@triton.jit
def inputs_of(
    q_ptr, k_ptr, v_ptr, seed_ptr, start, head, q_stride, k_stride, v_stride, HEAD: tl.constexpr, DROPOUT: tl.constexpr
):  # fmt: skip
    """Where q, k and v of one head of a sequence begin, and the seed, 0 without dropout."""
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    at = head * HEAD
    return q_ptr + (start * q_stride + at), k_ptr + (start * k_stride + at), v_ptr + (start * v_stride + at), seed


@triton.jit
def spans(row, length, before, after, ROWS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """first, full_first, full_last, last, where row i sees the others from i - before to i + after."""
    if WINDOW:
        last_row = tl.minimum(row + ROWS, length) - 1
        first = tl.maximum(row - before, 0) // BLOCK * BLOCK
        full_first = (tl.maximum(last_row - before, 0) + BLOCK - 1) // BLOCK * BLOCK
        full_last = tl.maximum(tl.minimum(length, row + after + 1) // BLOCK * BLOCK, full_first)
        last = tl.minimum(length, row + ROWS + after)
        return first, full_first, full_last, last
    else:
        return 0, 0, length // BLOCK * BLOCK, length


@triton.jit
def edges(first, full_first, full_last, last, BLOCK: tl.constexpr):
    """How many blocks there are at the edges."""
    return (full_first - first) // BLOCK + (last - full_last + BLOCK - 1) // BLOCK


@triton.jit
def edge(n, first, full_first, full_last, BLOCK: tl.constexpr):
    """The first row of edge n."""
    row = first + n * BLOCK
    return tl.where(row < full_first, row, row + (full_last - full_first))


@triton.jit
def sees(rows, others, length, before, after, WINDOW: tl.constexpr):
    """Whether rows [R, 1] of the sequence see others [1, C], of which there are `length`."""
    if WINDOW:
        lowest = rows - before
        count = tl.minimum(rows + after, length - 1) - lowest
        # One comparison for both limits: what is below the lowest becomes a large unsigned number.
        return (others - lowest).to(tl.uint32, bitcast=True) <= count.to(tl.uint32, bitcast=True)
    else:
        return others < length


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(ptr, row, length, stride, ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, ALL: tl.constexpr):
    """[ROWS, D] from `row` on: 0 in columns from HEAD on, and, unless ALL rows are there, from `length` on."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    place = ptr + tl.cast(row, tl.int64) * stride + (rows * stride + columns)
    if ALL and HEAD == D:
        return tl.load(place)
    elif ALL:
        return tl.load(place, mask=columns < HEAD, other=0.0)
    elif HEAD == D:
        return tl.load(place, mask=row + rows < length, other=0.0)
    else:
        return tl.load(place, mask=(row + rows < length) & (columns < HEAD), other=0.0)


@triton.jit
def store_tile(ptr, x, row, length, stride, HEAD: tl.constexpr):
    """Stores x [ROWS, D], rounded; only rows before `length` and columns before HEAD are there."""
    rows, columns = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    place = ptr + tl.cast(row, tl.int64) * stride + (rows * stride + columns)
    there = row + rows < length
    if x.shape[1] != HEAD:
        there = there & (columns < HEAD)
    tl.store(place, x.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def product(a, b, c=None):
    """a b, or a b + c, in float32: float32 is not rounded to tf32."""
    return tl.dot(a, b, c, input_precision="ieee")
