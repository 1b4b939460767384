"""embedding_norm by the C++ modules; the contract is in `fastbert.ops.embedding_norm`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, contiguous, launcher

NAMES = "words", "positions", "types", "tasks"


def embedding_norm_forward(
    words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor, position_ids: Tensor,
    type_ids: Tensor | None, task_ids: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
    seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tables = [contiguous(x) for x in (words, positions, types, tasks)]
    ids = [contiguous(x) for x in (word_ids, position_ids, type_ids, task_ids)]
    weight, bias = weight.contiguous(), bias.contiguous()
    y = words.new_empty(len(word_ids), words.shape[1], dtype=dtype)
    mean = words.new_empty(len(word_ids), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    module, launch = launcher(y, y.numel())
    wrong = module.embedding_norm_forward(
        *_sum(tables, ids, y, launch), weight.data_ptr(), bias.data_ptr(), eps, t, address(seed), y.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), DTYPES[weight.dtype],
    )  # fmt: skip
    if wrong >= 0:
        check_ids(tables, ids)
    return y, mean, rstd


def embedding_norm_recompute(
    dy: Tensor, words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor,
    position_ids: Tensor, type_ids: Tensor | None, task_ids: Tensor | None, t: int, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy = dy.contiguous()
    tables = [contiguous(x) for x in (words, positions, types, tasks)]
    ids = [contiguous(x) for x in (word_ids, position_ids, type_ids, task_ids)]
    z = torch.empty_like(dy)
    dropped = torch.empty_like(dy) if t > 0 else dy.new_empty(0)
    module, launch = launcher(dy, dy.numel())
    module.embedding_norm_recompute(
        *_sum(tables, ids, dy, launch), dy.data_ptr() if t > 0 else 0, t, address(seed), z.data_ptr(),
        dropped.data_ptr() if t > 0 else 0,
    )  # fmt: skip
    return z, dropped


def _sum(tables: list[Tensor | None], ids: list[Tensor | None], like: Tensor, launch: int) -> tuple[int, ...]:
    """The fields of contract.h's EmbeddingSum; the results are like `like`."""
    sizes = (0 if table is None else len(table) for table in tables)
    return (
        *map(address, tables), *map(address, ids), *sizes, *like.shape, DTYPES[like.dtype], DTYPES[tables[0].dtype],
        launch,
    )  # fmt: skip


def check_ids(tables: list[Tensor | None], ids: list[Tensor | None]) -> None:
    """Raises unless all ids name rows of their tables."""
    for name, table, its in zip(NAMES, tables, ids, strict=True):
        wrong = [] if its is None else ((its < 0) | (its >= len(table))).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(
                f"ids of {name} must lie in [0, {len(table)}), rows of their table; got {int(its[place])} for token "
                f"{place}: make them with the tokenizer and configuration that the table was made with"
            )
