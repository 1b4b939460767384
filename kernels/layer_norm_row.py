"""What LayerNorm's kernels for short and for long rows share: chunks of rows, [R, C], and the dropout before them."""

import triton
import triton.language as tl

from fastbert.kernels.philox import keep_row


@triton.jit
def mask_of(row, rows, column, H: tl.constexpr, C: tl.constexpr):
    """[R, C]: what there is of chunks. `rows` is None where all rows are there."""
    if rows is None:
        return column < H
    elif H % C == 0:
        return row < rows
    else:
        return (row < rows) & (column < H)


@triton.jit
def load_chunk(ptr, row, rows, first, H: tl.constexpr, C: tl.constexpr):
    """[R, C]: columns from `first` on of `row` [R, 1]; 0 from H and from `rows` on."""
    column = first + tl.arange(0, C)[None, :]
    return tl.load(ptr + row.to(tl.int64) * H + column, mask=mask_of(row, rows, column, H, C), other=0.0)


@triton.jit
def load_chunks(ptr, row, rows, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Whole rows, as K chunks."""
    chunks = ()
    for i in tl.static_range(K):
        chunks = chunks + (load_chunk(ptr, row, rows, i * C, H, C),)
    return chunks


@triton.jit
def store_chunk(ptr, value, row, rows, first, H: tl.constexpr, C: tl.constexpr):
    """A chunk [R, C], rounded."""
    column = first + tl.arange(0, C)[None, :]
    mask = mask_of(row, rows, column, H, C)
    tl.store(ptr + row.to(tl.int64) * H + column, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_parameter(ptr, row, first, H: tl.constexpr, C: tl.constexpr):
    """float32 of a chunk of weight, bias or x_bias, once a row, so that it lies in threads as a chunk of rows does."""
    column = first + tl.arange(0, C)[None, :] + row * 0
    return tl.load(ptr + column, mask=column < H, other=0.0).to(tl.float32)


@triton.jit
def keep_chunk(row, first, C: tl.constexpr, seed_ptr, bound):
    return keep_row(first // 8 + tl.arange(0, C // 8)[None, :], row, tl.load(seed_ptr), bound)


@triton.jit
def add_dropped(
    x, x_bias_ptr, residual, row, first, seed_ptr, bound, scale, ADD: tl.constexpr, H: tl.constexpr, C: tl.constexpr
):
    """float32 of the rounded residual + dropout(x + x_bias), chunks from column `first` on."""
    z = x.to(tl.float32)
    if x_bias_ptr is not None:
        z += load_parameter(x_bias_ptr, row, first, H, C)
    if seed_ptr is not None:
        z = tl.where(keep_chunk(row, first, C, seed_ptr, bound), z * scale, 0.0)
    if ADD:
        z += residual.to(tl.float32)
    return z.to(x.dtype).to(tl.float32)
