"""Packed batches for pretraining: random access by (epoch, batch), no state, and no padding unless shapes are fixed.

Iterate with `DataLoader(batches, batch_size=None, sampler=batches.numbers(first), num_workers=w)`: batch i of an epoch
is the same with any number of workers and wherever the iteration starts. An epoch begins at once, however long it is:
its order is computed place by place, and 65,536 samples in a row are put into batches when the first of them is asked
for.
"""

import bisect
import copy
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from fastbert.data.masking import Unit, budget, mask_tokens
from fastbert.data.order import BLOCK, at_places
from fastbert.data.packing import WINDOW, Shape, choose_shape, pack_samples
from fastbert.data.samples import cut_greedily, draw_next_pairs, draw_ordered_pairs, find_rows, find_spans
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import SpecialIds

LONGEST = 1 << 16
ROUNDED_TO = 64  # tokens of a batch, on a CPU
_BLOCKS_KEPT = 4  # of an epoch's samples put into batches: the current one, and those that workers lag behind
_DRAWN_FOR_SHAPE = 2 * WINDOW  # samples that decide the shape of static batches
# What is trained: masked words alone, or beside them next-sentence or sentence-order prediction; or the next word,
# or each word from either side ("bilm").
Objective = Literal["mlm", "mlm+nsp", "mlm+sop", "clm", "bilm"]
NEXT_WORD = "clm", "bilm"  # predict words of the text as it is, and mask nothing
# What a sample is made of: sentences of one document, or of a row of documents.
Inputs = Literal["doc-sentences", "full-sentences"]


class Batch(NamedTuple):
    """B samples with T tokens in all, packed one after another; the arguments of a pretraining model's `forward`.

    Attributes:
        input_ids: int64 [T], after masking; of "clm" the text itself.
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
            task_type_ids=None if self.task_type_ids is None else F.pad(self.task_type_ids, (0, padding)),
        )


class PretrainBatches(Dataset[Batch]):
    """The batches of one epoch over a token store, a map-style dataset.

    A sample is `[CLS] A [SEP] B [SEP]` with next-sentence or sentence-order prediction and `[CLS] A [SEP]` without
    either: sentences of one document, as many as fit in `seq_len`. Every epoch has all samples once, in an order given
    by (seed, epoch); a batch takes the next ones until `batch_tokens` would be exceeded. All other choices depend on
    (seed, epoch, sample) only.

    With "full-sentences" samples come in rows, see `find_rows`: the sentences of a row go on into the next document,
    and its part of each document is a sample of its own, with positions from 0 and no attention to the others. A batch
    is made of whole rows.

    With `static` all batches of all epochs have one `shape`, as `choose_shape` says, with T at most batch_tokens, and
    max_seqlen is seq_len. Samples are taken from the same order in such a way that next to nothing stays empty, see
    `pack_samples`; a sample counts with as many predictions as `budget` allows it, so that M always holds. What stays
    empty is padding as of `Batch.padded`, with labels of -100.
    Packing takes some microseconds a sample. Samples of a row are then packed each for itself.

    Batches are made of 65,536 samples (or rows) at a time; in static ones the last of so many may be nearly all
    padding, in the others it is what remains.

    Args:
        store: the tokens. special: the special ids of the tokenizer that wrote it.
        seq_len: longest sample, special tokens included; at least 8. The model's position table must be as long.
        batch_tokens: most tokens of a batch, special tokens included; at least seq_len.
        seed: 64-bit; epoch: 0, 1, ...; for evaluation fix it.
        objective: "mlm", "mlm+nsp" (pairs by `draw_next_pairs`), "mlm+sop" (`draw_ordered_pairs`), or "clm": the next
            token is predicted wherever it is not special, and nothing is masked; or "bilm": batches as of "clm".
        inputs: "doc-sentences", or for "mlm" and "clm" also "full-sentences".
        mask_prob, mask_share, random_share, unit: see `mask_tokens`.
        continues: bool [V], whether an id continues the word before it, as `continuations` says; a store that knows its
            words (`TokenStore.words`) says it of every token instead. None masks tokens, each for itself.
        task_type: the task that the samples are of, every token's in `task_type_ids` (ERNIE 2.0); None for none.
        static: batches of one shape, for CUDA graphs and torch.compile.

    Raises:
        ValueError: numbers outside these ranges, another objective, inputs or unit, special ids outside the vocabulary,
            `continues` of another vocabulary, "mlm+nsp" with a single document.
    """

    def __init__(
        self,
        store: TokenStore,
        special: SpecialIds,
        *,
        seq_len: int,
        batch_tokens: int,
        seed: int,
        epoch: int = 0,
        objective: Objective = "mlm+nsp",
        inputs: Inputs = "doc-sentences",
        mask_prob: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        unit: Unit = "word",
        continues: np.ndarray | None = None,
        task_type: int | None = None,
        static: bool = False,
    ):
        if not 8 <= seq_len <= LONGEST:
            raise ValueError(
                f"seq_len is a sample's length in tokens: expected 8 <= seq_len <= {LONGEST}, got {seq_len}"
            )
        if batch_tokens < seq_len:
            raise ValueError(
                f"batch_tokens must hold at least one sample: expected >= seq_len = {seq_len}, got {batch_tokens}"
            )
        if not 0.0 < mask_prob < 1.0:
            raise ValueError(f"mask_prob is the share of tokens to mask: expected 0 < mask_prob < 1, got {mask_prob}")
        if min(mask_share, random_share) < 0.0 or mask_share + random_share > 1.0:
            raise ValueError(
                "mask_share and random_share are parts of a whole, the rest stays: expected both >= 0 and a sum <= 1, "
                f"got {mask_share} and {random_share}"
            )
        if max(special) >= store.vocab_size:
            raise ValueError(
                f"special id {max(special)} is outside the store's vocabulary of {store.vocab_size}: use the tokenizer "
                "that wrote the store"
            )
        choices = ("objective", objective, Objective), ("inputs", inputs, Inputs), ("unit", unit, Unit)
        for name, value, kind in choices:
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        if inputs == "full-sentences" and objective not in ("mlm", *NEXT_WORD):
            raise ValueError(f"{inputs} have no pairs of texts: expected objective mlm, clm or bilm, got {objective!r}")
        if objective == "mlm+nsp" and len(store.documents) < 3:
            raise ValueError(
                "next-sentence prediction takes random sentences from other documents, and this store has only one: "
                "separate the documents of a text file by blank lines, or train without it (--objective mlm+sop or mlm)"
            )
        if continues is not None and (continues.dtype != bool or continues.shape != (store.vocab_size,)):
            raise ValueError(
                f"continues must be bool [{store.vocab_size}], a flag for every id of the store's vocabulary, got "
                f"{continues.dtype} {list(continues.shape)}: make it of the tokenizer that wrote the store"
            )
        self.store, self.special, self.objective = store, special, objective
        self.seed, self.seq_len, self.batch_tokens = seed, seq_len, batch_tokens
        self.masking = {
            "mask_prob": mask_prob, "mask_share": mask_share, "random_share": random_share, "unit": unit,
        }  # fmt: skip
        self.continues, self.task_type = continues, task_type
        self.pairs = {"mlm+nsp": draw_next_pairs, "mlm+sop": draw_ordered_pairs}.get(objective)
        self.extra = 3 if self.pairs else 2  # [CLS] and [SEP]s
        if inputs == "full-sentences":
            self.spans, self.rows = find_rows(store, seq_len, self.extra)
        else:
            self.spans = find_spans(store, seq_len - self.extra, shortest=2 if self.pairs else 1)
        if not len(self.spans.starts):
            raise ValueError(
                "no document has the two tokens that a pair needs: train on masked words alone (--objective mlm)"
            )
        if inputs == "doc-sentences" or static:
            self.rows = None  # a sample each
        self.count = len(self.spans.starts) if self.rows is None else len(self.rows) - 1
        self.shape: Shape | None = None
        if static:
            content = (np.arange(seq_len + 1) - self.extra).clip(min=0)
            self.predictions = content if objective in NEXT_WORD else budget(content, mask_prob)  # by a sample's length
            some = at_places(0, min(_DRAWN_FOR_SHAPE, self.count), self.count, seed, 0)
            self.shape = choose_shape(self._lengths(some, 0), self.predictions, batch_tokens, seq_len)
        self._begin(epoch)

    def at_epoch(self, epoch: int) -> "PretrainBatches":
        """The batches of another epoch; the samples, found once, are shared."""
        other = copy.copy(self)
        other._begin(epoch)
        return other

    def _begin(self, epoch: int) -> None:
        if not 0 <= epoch < 1 << 32:
            raise ValueError(f"epochs are counted from 0 to 2**32 - 1, got {epoch}")
        self.epoch = epoch
        self.ends = [0]  # batches up to the end of each block that was looked at
        self.blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a block batch by batch, and where the batches begin there, and its end."""
        if number not in self.blocks:
            first = number * BLOCK
            rows = at_places(first, min(first + BLOCK, self.count), self.count, self.seed, self.epoch)
            if self.shape is None:
                samples, counts = self._samples(rows)
                lengths = self.spans.ends[samples] - self.spans.starts[samples] + self.extra
                lengths = np.add.reduceat(lengths, np.cumsum(counts) - counts)
                cuts = cut_greedily(np.append(0, np.cumsum(lengths)), self.batch_tokens)
            else:
                packed, cuts = pack_samples(self._lengths(rows, self.epoch), self.predictions, self.shape, self.seq_len)
                rows = rows[packed]
            while len(self.blocks) >= _BLOCKS_KEPT:
                del self.blocks[next(iter(self.blocks))]
            self.blocks[number] = rows, cuts
        return self.blocks[number]

    def _find(self, i: int) -> int | None:
        """The block of batch i; None where the epoch has fewer batches."""
        while i >= self.ends[-1]:
            if (len(self.ends) - 1) * BLOCK >= self.count:
                return None
            self.ends.append(self.ends[-1] + len(self._block(len(self.ends) - 1)[1]) - 1)
        return bisect.bisect_right(self.ends, i) - 1

    @property
    def empty_share(self) -> float:
        """Of the places of static batches the share that stays empty, in the first 65,536 samples of the epoch."""
        rows, cuts = self._block(0)
        return 1.0 - self._lengths(rows, self.epoch).sum() / (self.shape.tokens * (len(cuts) - 1))

    def _samples(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples of rows, and how many each row has."""
        if self.rows is None:
            return rows, np.ones(len(rows), np.int64)
        counts = self.rows[rows + 1] - self.rows[rows]
        return np.repeat(self.rows[rows], counts) + _ranges(counts), counts

    def _lengths(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of samples with the special ones; a random second text may be shorter than the one it replaces."""
        if self.objective != "mlm+nsp":
            return self.spans.ends[samples] - self.spans.starts[samples] + self.extra
        return draw_next_pairs(self.store, self.spans, samples, self.seed, epoch).lengths.sum(1) + self.extra

    def __len__(self) -> int:
        """Batches in the epoch; of a long one this takes as long as putting all of its samples into batches."""
        self._find(BLOCK * self.count)
        return self.ends[-1]

    def numbers(self, first: int = 0) -> Iterator[int]:
        """The numbers of the epoch's batches from `first` on, of which none is made before it is asked for."""
        while self._find(first) is not None:
            yield first
            first += 1

    def __getitem__(self, i: int) -> Batch:
        number = self._find(i) if i >= 0 else None
        if number is None:
            raise IndexError(f"batch {i} of epoch {self.epoch}: expected 0 <= i < {len(self)}")
        rows, cuts = self._block(number)
        place = i - self.ends[number]
        samples, _ = self._samples(rows[cuts[place] : cuts[place + 1]])
        if self.pairs:
            starts, lengths, sentence_label = self.pairs(self.store, self.spans, samples, self.seed, self.epoch)
        else:
            starts = self.spans.starts[samples, None]
            lengths = self.spans.ends[samples, None] - starts
            sentence_label = None

        # [CLS] A [SEP] B [SEP]: a segment is followed by a [SEP], the first one preceded by [CLS].
        sizes = lengths + 1
        sizes[:, 0] += 1
        ends = np.cumsum(sizes.ravel())
        cu_seqlens = np.append(0, ends[sizes.shape[1] - 1 :: sizes.shape[1]])
        input_ids = np.full(ends[-1], self.special.sep, np.int64)
        input_ids[cu_seqlens[:-1]] = self.special.cls
        source, target = starts.ravel(), ends - 1 - lengths.ravel()
        within = _ranges(lengths.ravel())
        places = np.repeat(target, lengths.ravel()) + within
        input_ids[places], words = self.store.ids_and_words(
            self.store.tokens[np.repeat(source, lengths.ravel()) + within]
        )
        token_types = np.repeat(np.tile(np.arange(sizes.shape[1]), len(samples)), sizes.ravel())
        seqlens = np.diff(cu_seqlens)
        if self.objective in NEXT_WORD:
            masked, positions = input_ids, np.flatnonzero(~np.isin(input_ids[1:], self.special))
            labels = input_ids[positions + 1]
        else:
            continued = None if self.continues is None else self.continues[input_ids]
            if continued is not None and words is not None:
                continued[places] = words
            masked, positions, labels = mask_tokens(
                input_ids,
                cu_seqlens,
                samples,
                self.special,
                self.store.vocab_size,
                seed=self.seed,
                epoch=self.epoch,
                continued=continued,
                **self.masking,
            )
        batch = Batch(
            input_ids=torch.from_numpy(masked),
            token_type_ids=torch.from_numpy(token_types),
            position_ids=torch.from_numpy(_ranges(seqlens)),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(seqlens.max()),
            masked_positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            sentence_label=None if sentence_label is None else torch.from_numpy(sentence_label),
            filled_tokens=len(masked),
            task_type_ids=None if self.task_type is None else torch.full((len(masked),), self.task_type),
        )
        if self.shape is None:
            return batch
        return batch.padded(self.special.pad, self.shape, self.seq_len)._replace(max_seqlen=self.seq_len)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..lengths[0]-1, 0..lengths[1]-1, ... in one array."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)
