"""Embeddings looked up, added, normalized and dropped: how BERT's encoder begins, in one pass over memory.

    z = words[word_id] + positions[position_id] + types[type_id] + tasks[task_id]    rounded to y's dtype
    y = dropout((z - mean(z)) * rstd(z) * weight + bias)                             as `layer_norm` and `dropout`

Tables are [V, H], ids int64 [T], weight and bias [H], y and z [T, H], mean and rstd [T]. Backward saves neither y nor
z, but ids, tables, mean and rstd: `embedding_norm_recompute` makes z anew, and with it the gradient of what was
dropped, for LayerNorm's own backward. That gives dz, which is every table's share: `embedding.table_gradient` adds it
up by ids. Sources: Devlin, Chang, Lee and Toutanova, "BERT" (2019), and those of the two ops.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.backends import embedding_norm as kernels
from fastbert.backends import pick, requested
from fastbert.ops import layer_norm, philox
from fastbert.ops.checks import as_float, autocast, check_activation, check_tensor, check_vectors, wide
from fastbert.ops.dropout import dropped
from fastbert.ops.embedding import add_to_table, has_kernel, table_gradient
from fastbert.ops.register import differentiated, once_differentiable, register

NAMES = "words", "positions", "types", "tasks"


class Table(NamedTuple):
    """A table whose rows are added up.

    Attributes:
        weight: [V, H].
        ids: int64 or int32 [T], below V; None is row 0 for all tokens.
        padding_idx: the row that takes no gradient; None for none.
        sparse: whether the gradient is a sparse COO tensor of the tokens' rows.
    """

    weight: Tensor
    ids: Tensor | None
    padding_idx: int | None = None
    sparse: bool = False


def embedding_norm(
    tables: Sequence[Table],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`dropout(layer_norm(sum of the tables' rows))`, and the first table for its second use.

    Args:
        tables: of words, positions, token types and, where there are any, task types; the first two with ids. Of one
            dtype: float32, bfloat16 or float16 (float64 on the reference backend).
        weight, bias: [H], float32 or y's dtype.
        eps: added to the variance, finite and at least 0.
        dropout_p: probability that an element of y is dropped, see `dropout`.
        seed: an int, or int64 [1] on the tables' device; None draws one from torch's default generator.
        backend: runs on this backend or raises; None chooses by the tables' device.

    Returns:
        y [T, H] in the tables' dtype, under autocast of float32 tables in the autocast dtype; and the first table as
        `tied_embedding` gives it.

    Raises:
        ValueError, TypeError: a shape, dtype, device, probability, seed or eps that does not fit; ids out of range,
            which a GPU finds and a later call reports (`fastbert.check_device_errors`).
        RuntimeError: an explicit backend that cannot run here.
    """
    _check(tables)
    like = autocast(tables[0].weight[:0])  # y's dtype
    check_vectors(like, weight=weight, bias=bias)
    if weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")
    eps = as_float("eps", eps)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is added to the variance: expected a finite number of at least 0, got {eps}")
    t = philox.threshold(dropout_p)
    seed = philox.resolve_seed(seed, t, like.device)
    chosen = pick("embedding_norm", requested(backend), like)
    rows = [table.weight for table in tables]
    ids = [None if table.ids is None else table.ids.long() for table in tables]
    none = [None] * (len(NAMES) - len(tables))
    arguments = *rows, *none, *ids, *none, weight, bias, eps, t, seed, like.dtype
    if not differentiated(*rows, weight, bias):
        return functions[chosen].embedding_norm_forward(*arguments)[0], rows[0]
    gradients = [(table.padding_idx, table.sparse) for table in tables]
    return _EmbeddingNorm.apply(chosen, gradients, *arguments)


def _check(tables: Sequence[Table]) -> None:
    """Raises unless they are three or four tables alike, with ids of as many tokens."""
    if not len(NAMES) - 1 <= len(tables) <= len(NAMES):
        raise ValueError(f"embedding_norm adds up rows of three or four tables ({', '.join(NAMES)}), got {len(tables)}")
    first = tables[0].weight
    for name, table in zip(NAMES, tables, strict=False):
        check_activation("embedding_norm", name, table.weight)
        if table.weight.dim() != 2 or len(table.weight) == 0 or table.weight.shape[1] != first.shape[-1]:
            raise ValueError(
                f"{name} must be a table [V, {first.shape[-1]}] with V >= 1, got shape {list(table.weight.shape)}"
            )
        if table.weight.dtype != first.dtype or table.weight.device != first.device:
            raise ValueError(
                f"{name} must be like words, {first.dtype} on {first.device}, got {table.weight.dtype} on "
                f"{table.weight.device}"
            )
        if table.ids is None:
            if name in NAMES[:2]:
                raise ValueError(f"{name} need ids: only types and tasks may leave them out, for their first row")
            continue
        check_tensor(f"ids of {name}", table.ids)
        expected = tables[0].ids.shape
        if table.ids.dtype not in (torch.int64, torch.int32) or table.ids.dim() != 1 or table.ids.shape != expected:
            raise ValueError(
                f"ids of {name} must be int64 or int32 [T], as many as of words, got {table.ids.dtype} "
                f"{list(table.ids.shape)}"
            )
        if table.ids.device != first.device:
            raise ValueError(f"ids of {name} must be on the tables' device {first.device}, got {table.ids.device}")


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def embedding_norm_forward(
        words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor, position_ids: Tensor,
        type_ids: Tensor | None, task_ids: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
        seed: Tensor | None, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        z = _sum(words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids).to(dtype)
        y, _, mean, rstd = layer_norm.reference.layer_norm_forward(wide(z), None, None, weight, bias, eps, 0, None)
        return (dropped(y, t, seed) if t > 0 else y).to(dtype).contiguous(), mean, rstd

    @staticmethod
    def embedding_norm_recompute(
        dy: Tensor, words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor,
        position_ids: Tensor, type_ids: Tensor | None, task_ids: Tensor | None, t: int, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """z in dy's dtype, and dropout's gradient of dy; empty where nothing was dropped, since it is dy then."""
        z = _sum(words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids).to(dy.dtype)
        if t == 0:
            return z, dy.new_empty(0)
        return z, dropped(wide(dy), t, seed).to(dy.dtype).contiguous()


def _sum(*given: Tensor | None) -> Tensor:
    """Of four tables and four ids."""
    z = None
    for table, ids in zip(given[: len(NAMES)], given[len(NAMES) :], strict=True):
        if table is not None:
            row = wide(table[0] if ids is None else table.index_select(0, ids))
            z = row if z is None else z + row
    return z


def _fake_forward(words, positions, types, tasks, word_ids, *others):
    shape, dtype = (word_ids.shape[0], words.shape[1]), others[-1]  # len would make a number of a symbol
    mean, rstd = (words.new_empty(shape[:1], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    return words.new_empty(shape, dtype=dtype), mean, rstd


functions = register(
    reference,
    kernels,
    embedding_norm_forward=_fake_forward,
    embedding_norm_recompute=lambda dy, *others: (
        dy.new_empty(dy.shape),
        dy.new_empty(0 if others[-2] == 0 else dy.shape),
    ),
)


class _EmbeddingNorm(torch.autograd.Function):
    """Of four tables, of which the last may be None, their ids, and the op's other arguments behind them."""

    @staticmethod
    def forward(ctx, chosen, gradients, *arguments):
        *looked_up, weight, _, _, t, seed, _ = arguments
        y, mean, rstd = functions[chosen].embedding_norm_forward(*arguments)
        ctx.save_for_backward(*looked_up, weight, mean, rstd, seed)
        ctx.options = chosen, t, gradients, has_kernel(looked_up[0])
        ctx.set_materialize_grads(False)
        return y, looked_up[0].view_as(looked_up[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dwords):
        *looked_up, weight, mean, rstd, seed = ctx.saved_tensors
        chosen, t, gradients, by_kernel = ctx.options
        if dy is None:
            return None, None, dwords, *(None,) * 13
        z, undropped = functions[chosen].embedding_norm_recompute(dy, *looked_up, t, seed)
        dy = dy if t == 0 else undropped
        dz, _, dweight, dbias, _ = layer_norm.functions[chosen].layer_norm_backward(
            dy, None, z, weight, mean, rstd, 0, None, False
        )
        dz = dz.to(looked_up[0].dtype)
        tables, ids = looked_up[: len(NAMES)], looked_up[len(NAMES) :]
        results = [None] * len(NAMES)
        for i, (padding_idx, sparse) in enumerate(gradients):
            if not ctx.needs_input_grad[2 + i]:
                continue
            if i == 0 and dwords is not None:
                results[i] = add_to_table(dwords, dz, ids[i], padding_idx, sparse, by_kernel)
            else:
                results[i] = table_gradient(dz, ids[i], len(tables[i]), padding_idx, sparse, by_kernel)
        return None, None, *results, *(None,) * len(NAMES), dweight, dbias, *(None,) * 4
