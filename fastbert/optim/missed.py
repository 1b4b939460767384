"""What an optimizer with `missed="replay"` offers around its step: rows are brought before they are read.

How a row makes up for its missed steps, and what is kept for that, is in `replay`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastbert.optim import gradients, replay
from fastbert.optim.options import check_padding_idx


class MissedSteps:
    """The part of LazyAdam that ties it to embeddings and brings their rows."""

    is_raw = False  # within `raw()`

    def attach(self, embedding: nn.Module) -> None:
        """Ties an `nn.Embedding` or `nn.EmbeddingBag` to this optimizer.

        Its `padding_idx` never moves. With `missed="replay"` rows are brought up to date before the module reads them,
        and all of them before its `state_dict()` and `load_state_dict()`, except within `raw()`.

        Raises:
            ValueError: its weight is not this optimizer's, or its padding_idx is not a row.
            TypeError: it is no embedding.
        """
        if not isinstance(getattr(embedding, "weight", None), Tensor) or not hasattr(embedding, "padding_idx"):
            raise TypeError(f"attach takes an nn.Embedding or nn.EmbeddingBag, got {type(embedding)}")
        group = self._group_of(embedding.weight)
        check_padding_idx(embedding.padding_idx, embedding.weight)
        if embedding.padding_idx is not None:
            self._padding[embedding.weight] = embedding.padding_idx
            self._forget_plans()
        if group["missed"] == "replay":
            hook = replay.Hook(self)
            embedding.register_forward_pre_hook(hook.before_forward, with_kwargs=True)
            embedding.register_state_dict_pre_hook(hook.before_state_dict)
            embedding.register_load_state_dict_pre_hook(hook.before_load)

    @torch.no_grad()
    def catch_up(self, param: Tensor, ids: Tensor | None = None) -> None:
        """Brings rows of a parameter, or all, to the last step; nothing to do unless `missed="replay"`.

        Args:
            ids: of any shape and integer type.

        Raises:
            ValueError: ids outside the table, or a parameter that is not this optimizer's.
            TypeError: ids that are not an integer tensor.
            RuntimeError: a row to be brought has a gradient already, which was computed from where it stood before.
        """
        group = self._group_of(param)
        rows = None if ids is None else gradients.row_ids(ids, param)
        its, padding_idx = self.state.get(param, {}), self._padding_idx(param, group)
        replay.check_unread(param, its, rows, padding_idx)
        replay.catch_up(param, its, rows, padding_idx)

    def flush(self) -> None:
        """Brings all rows of all parameters to the last step."""
        for param in self._parameters():
            self.catch_up(param)

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """Within the block, `state_dict()` of an attached module does not bring its rows up to date.

        For checkpoints to resume from, together with this optimizer's state: both are as they stand.
        """
        before, self.is_raw = self.is_raw, True
        try:
            yield
        finally:
            self.is_raw = before
