"""A packed batch for pretraining, as a model takes it, and what makes its shape one of a few."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.data.packing import Shape

ROUNDED_TO = 64  # tokens of a batch, on a CPU


class Batch(NamedTuple):
    """B samples with T tokens in all, packed one after another; the arguments of a pretraining model's `forward`.

    Attributes:
        input_ids: int64 [T], after masking; of "clm" and "plm" the text itself.
        token_type_ids: int64 [T], 0 up to the first [SEP], 1 after it.
        position_ids: int64 [T], the place in the sample.
        cu_seqlens: int32 [B + 1], sample b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: length of the longest sample.
        masked_positions: int64 [M], places in the packed tokens, ascending.
        labels: int64 [M], the original ids there; of "clm" the next ones.
        sentence_label: int64 [B], of next-sentence prediction 0 next and 1 random, of sentence-order prediction 0 in
            order and 1 swapped, -100 to ignore; None without either.
        filled_tokens: how many of the tokens are the samples'; those behind them are padding.
        task_type_ids: int64 [T], ERNIE's; None without.
        query_ranks, key_ranks: int32 [T], of "plm", whose queries are among the tokens, see `permutation`; None
            without.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked_positions: Tensor
    labels: Tensor
    sentence_label: Tensor | None
    filled_tokens: int
    task_type_ids: Tensor | None = None
    query_ranks: Tensor | None = None
    key_ranks: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`."""
        return Batch(*(x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x for x in self))

    def filled(
        self, pad_id: int, tokens: int = ROUNDED_TO, masked: int = 32, samples: int = 8, longest: int | None = None
    ) -> "Batch":
        """The same batch with T, M and B rounded up, so that batches share a few shapes.

        A CPU's product library prepares code for every new shape, which costs more than a small model's step. What is
        added changes no loss and no gradient: last samples of padding and empty ones behind them, with labels that are
        ignored.

        Args:
            pad_id: the id of the padding.
            tokens, masked, samples: T, M and B become multiples of these.
            longest: the model's longest sample, its position table's rows; None for no limit.
        """
        padding, longest = -len(self.input_ids) % tokens, longest or tokens
        pieces = -(-padding // longest)
        sequences, labels = len(self.cu_seqlens) - 1 + pieces, len(self.labels)
        shape = Shape(len(self.input_ids) + padding, sequences + -sequences % samples, labels + -labels % masked)
        return self.padded(pad_id, shape, longest)

    def padded(self, pad_id: int, shape: Shape, longest: int) -> "Batch":
        """The same batch with the T, B and M of `shape`, which must hold it and its padding.

        Padding stands behind the samples, as samples of at most `longest` tokens, so that attention computes little for
        it, and empty samples behind these. Labels there are -100, so that losses and gradients stay what they are.
        """
        total, bounds, label = len(self.input_ids), self.cu_seqlens, self.sentence_label
        padding, more, ignored = (
            wanted - there for wanted, there in zip(shape, (total, len(bounds) - 1, len(self.labels)), strict=True)
        )
        if not (padding or more or ignored):
            return self
        ends = total + longest * torch.arange(1, more + 1, dtype=bounds.dtype, device=bounds.device)
        places = torch.arange(padding, device=bounds.device) % longest
        return Batch(
            input_ids=F.pad(self.input_ids, (0, padding), value=pad_id),
            token_type_ids=F.pad(self.token_type_ids, (0, padding)),
            position_ids=torch.cat([self.position_ids, places]),
            cu_seqlens=torch.cat([bounds, ends.clamp(max=shape.tokens)]),
            max_seqlen=max(self.max_seqlen, min(padding, longest)),
            masked_positions=F.pad(self.masked_positions, (0, ignored)),
            labels=F.pad(self.labels, (0, ignored), value=-100),
            sentence_label=None if label is None else F.pad(label, (0, more), value=-100),
            filled_tokens=self.filled_tokens,
            **{
                name: None if x is None else F.pad(x, (0, padding))
                for name in ("task_type_ids", "query_ranks", "key_ranks")
                for x in (getattr(self, name),)
            },
        )
