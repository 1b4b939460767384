"""Embeddings on a GPU whose table's gradient takes one kernel, where torch sorts the ids by a dozen.

    x = table[ids],   dtable[id] += sum of dx over the tokens of that id

table is [V, H], ids int64 [T], x [T, H]. Sums are in float32 in an order that follows from the ids alone, and rounded
to the table's dtype once for each 4,096 tokens of neighbouring words. A table that also decodes, as the word embeddings
of BERT do, has the gradient of its product already when that of its look-up comes: it is added there, in place.

A 16-bit table of very few rows, or of up to 1,024 where the backend "cuda" does not run, has its gradient by one
product instead, summed in float32 and always in the same order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.backends import embedding as kernels
from fastbert.backends import pick, requested
from fastbert.ops.register import once_differentiable, register


def has_kernel(table: Tensor) -> bool:
    """Whether the table's gradient can be had here: on a GPU that the backend "cuda" runs on."""
    return table.is_cuda and pick("embedding", requested(), table) == "cuda"


def embedding(ids: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
    """table[ids], ids [T]. The row `padding_idx` takes no gradient."""
    return _Embedding.apply(ids, table, padding_idx)[0]


def tied_embedding(ids: Tensor, table: Tensor, padding_idx: int | None = None) -> tuple[Tensor, Tensor]:
    """table[ids], and the table itself for its second use, which must be one that makes its gradient anew.

    The gradient of this second use is not kept apart: that of the look-up is added to it in place.
    """
    return _Embedding.apply(ids, table, padding_idx)


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch, on any device."""

    @staticmethod
    def embedding_backward(dtable: Tensor, dx: Tensor, ids: Tensor, padding_idx: int, fills: bool) -> None:
        """Adds to `dtable` [V, H]; where it `fills`, dtable holds nothing yet. padding_idx -1 leaves no row out."""
        kept = (ids != padding_idx) & (ids >= 0) & (ids < len(dtable))
        total = torch.zeros(dtable.shape, dtype=torch.promote_types(dtable.dtype, torch.float32), device=dtable.device)
        total.index_add_(0, ids[kept], dx[kept].to(total.dtype))
        dtable.copy_(total if fills else total + dtable)


functions = register(reference, kernels, ("dtable",), embedding_backward=lambda *_: None)


FEW_ROWS = 1024
VERY_FEW_ROWS = 16  # a block of the kernel would have all tokens


def table_gradient(
    dx: Tensor, ids: Tensor | None, rows: int, padding_idx: int | None, sparse: bool, by_kernel: bool
) -> Tensor:
    """The gradient of a table of which a look-up gave x.

    Args:
        dx: [T, H] in the table's dtype.
        ids: [T]; None where all tokens took row 0.
        rows: V.
        padding_idx: the row that takes no gradient, or None.
        sparse: the gradient is sparse COO, a row for each token.
        by_kernel: whether `has_kernel(table)` held in the forward pass.

    Returns:
        [V, H] in dx's dtype.
    """
    if ids is None:
        dtable = dx.new_zeros(rows, dx.shape[1])
        if padding_idx != 0:
            dtable[0] = dx.sum(0)
        return dtable
    few = VERY_FEW_ROWS if by_kernel else FEW_ROWS
    is_16_bit = dx.dtype in (torch.bfloat16, torch.float16)
    if dx.is_cuda and is_16_bit and rows <= few and padding_idx is None and not sparse:
        row = torch.arange(rows, device=ids.device).unsqueeze(1)
        return torch.eq(row, ids, out=dx.new_empty(rows, dx.shape[0])) @ dx  # [V, T] of 0 and 1
    if not by_kernel or sparse:
        number = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_backward(dx, ids, rows, number, False, sparse)
    dtable = dx.new_empty(rows, dx.shape[1])
    functions["cuda"].embedding_backward(dtable, dx, ids, -1 if padding_idx is None else padding_idx, True)
    return dtable


def add_to_table(
    dtable: Tensor, dx: Tensor, ids: Tensor, padding_idx: int | None, sparse: bool, by_kernel: bool
) -> Tensor:
    """`dtable` of the table's second use, and the gradient of its look-up added to it: in place by the kernel."""
    if not by_kernel or sparse:
        return dtable + table_gradient(dx, ids, len(dtable), padding_idx, sparse, by_kernel)
    dtable = dtable.contiguous()
    functions["cuda"].embedding_backward(dtable, dx, ids, -1 if padding_idx is None else padding_idx, False)
    return dtable


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, table, padding_idx):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.options = len(table), (padding_idx, False, has_kernel(table))
        ctx.set_materialize_grads(False)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dtable):
        (ids,) = ctx.saved_tensors
        if dx is None:
            return None, dtable, None
        if dtable is None:
            return None, table_gradient(dx, ids, ctx.rows, *ctx.options), None
        return None, add_to_table(dtable, dx, ids, *ctx.options), None
