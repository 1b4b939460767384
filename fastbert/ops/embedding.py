"""Embeddings on a GPU whose table's gradient takes one kernel, where torch sorts the ids by a dozen.

    x = table[ids],   dtable[id] += sum of dx over the tokens of that id

table is [V, H], ids int64 [T], x [T, H]. Sums are in float32 in an order that follows from the ids alone, and rounded
to the table's dtype once for each 4,096 tokens of neighbouring words. A table that also decodes, as the word embeddings
of BERT do, has the gradient of its product already when that of its look-up comes: it is added there, in place.
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
    """table[ids], where `has_kernel(table)`. The row `padding_idx` takes no gradient."""
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


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, table, padding_idx):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx = table.shape, -1 if padding_idx is None else padding_idx
        ctx.set_materialize_grads(False)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dtable):
        (ids,) = ctx.saved_tensors
        if dx is not None:
            fills = dtable is None
            dtable = dx.new_empty(ctx.shape) if fills else dtable.contiguous()
            functions["cuda"].embedding_backward(dtable, dx, ids, ctx.padding_idx, fills)
        return None, dtable, None
