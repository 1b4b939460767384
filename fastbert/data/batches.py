"""Packed batches for pretraining: random access by (epoch, batch), no state, and no padding unless shapes are fixed.

Iterate with `DataLoader(batches, batch_size=None, sampler=batches.numbers(first), num_workers=w)`: batch i of an epoch
is the same with any number of workers and wherever the iteration starts. An epoch begins at once, however long it is:
its order is computed place by place, and 65,536 samples in a row are put into batches when the first of them is asked
for.
"""

import bisect
import copy
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from fastbert.data.batch import Batch
from fastbert.data.masking import Unit, budget, mask_tokens
from fastbert.data.order import BLOCK, at_places
from fastbert.data.packing import WINDOW, Shape, choose_shape, pack_samples
from fastbert.data.permutation import permute
from fastbert.data.samples import cut_greedily, draw_next_pairs, draw_ordered_pairs, find_rows, find_spans
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import SpecialIds

LONGEST = 1 << 16
_BLOCKS_KEPT = 4  # of an epoch's samples put into batches: the current one, and those that workers lag behind
_DRAWN_FOR_SHAPE = 2 * WINDOW  # samples that decide the shape of static batches
# What is trained: masked words alone, or beside them next-sentence or sentence-order prediction; the next word; words
# in a random order ("plm"); or each word from either side ("bilm").
Objective = Literal["mlm", "mlm+nsp", "mlm+sop", "clm", "plm", "bilm"]
NEXT_WORD = "clm", "bilm"  # predict words of the text as it is, and mask nothing
# What a sample is made of: sentences of one document, or of a row of documents.
Inputs = Literal["doc-sentences", "full-sentences"]


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
    max_seqlen is `longest`. Samples are taken from the same order in such a way that next to nothing stays empty, see
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
            token is predicted wherever it is not special, and nothing is masked. "plm": `mask_prob` of the tokens, in
            units, are predicted in a random order, see `permutation`; a sample then has a query more for each, and with
            them at most `longest` tokens, which batch_tokens must hold. "bilm": batches as of "clm".
        inputs: "doc-sentences", or for "mlm" and "clm" also "full-sentences".
        mask_prob, mask_share, random_share, unit: see `mask_tokens`.
        continues: bool [V], whether an id continues the word before it, as `continuations` says; a store that knows its
            words (`TokenStore.words`) says it of every token instead. None masks tokens, each for itself.
        task_type: the task that the samples are of, every token's in `task_type_ids` (ERNIE 2.0); None for none.
        static: batches of one shape, for CUDA graphs and torch.compile.

    Attributes:
        longest: most tokens of a sample: seq_len, and in "plm" the queries of so many.

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
        self.objective, self.seq_len, self.mask_prob = objective, seq_len, mask_prob
        self.pairs = {"mlm+nsp": draw_next_pairs, "mlm+sop": draw_ordered_pairs}.get(objective)
        self.extra = 3 if self.pairs else 2  # [CLS] and [SEP]s
        self.longest = int(self._with_queries(np.array(seq_len)))
        if batch_tokens < self.longest:
            queries = "" if objective != "plm" else f" and {self.longest - seq_len} queries"
            raise ValueError(
                f"batch_tokens must hold at least one sample: expected >= seq_len = {seq_len}{queries}, got "
                f"{batch_tokens}"
            )
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
        self.store, self.special, self.seed, self.batch_tokens = store, special, seed, batch_tokens
        self.masking = {"mask_share": mask_share, "random_share": random_share, "unit": unit}
        self.continues, self.task_type = continues, task_type
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
            self.predictions = self._predictions()
            some = at_places(0, min(_DRAWN_FOR_SHAPE, self.count), self.count, seed, 0)
            self.shape = choose_shape(self._lengths(some, 0), self.predictions, batch_tokens, self.longest)
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
                lengths = self._with_queries(self.spans.ends[samples] - self.spans.starts[samples] + self.extra)
                lengths = np.add.reduceat(lengths, np.cumsum(counts) - counts)
                cuts = cut_greedily(np.append(0, np.cumsum(lengths)), self.batch_tokens)
            else:
                packed, cuts = pack_samples(self._lengths(rows, self.epoch), self.predictions, self.shape, self.longest)
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
            return self._with_queries(self.spans.ends[samples] - self.spans.starts[samples] + self.extra)
        return draw_next_pairs(self.store, self.spans, samples, self.seed, epoch).lengths.sum(1) + self.extra

    def _with_queries(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of samples of these lengths, with as many queries as they can have."""
        return lengths if self.objective != "plm" else lengths + budget(lengths - self.extra, self.mask_prob)

    def _predictions(self) -> np.ndarray:
        """int64 [longest + 1]: how many predictions a sample has at most, by its tokens with its queries."""
        lengths = np.arange(self.extra, self.seq_len + 1)
        most = lengths - self.extra if self.objective == "clm" else budget(lengths - self.extra, self.mask_prob)
        by_length = np.zeros(self.longest + 1, np.int64)
        by_length[self._with_queries(lengths)] = most
        return np.maximum.accumulate(by_length)

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
        return self.made_of(self.samples(i))

    def samples(self, i: int) -> np.ndarray:
        """int64, the samples of batch i, which the samples before it in its block have to be put into batches for."""
        number = self._find(i) if i >= 0 else None
        if number is None:
            raise IndexError(f"batch {i} of epoch {self.epoch}: expected 0 <= i < {len(self)}")
        rows, cuts = self._block(number)
        place = i - self.ends[number]
        return self._samples(rows[cuts[place] : cuts[place + 1]])[0]

    def made_of(self, samples: np.ndarray) -> Batch:
        """The batch of these samples of the epoch, as `samples` gives them."""
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
        predicted = self._predicted(input_ids, cu_seqlens, samples, places, words)
        return self._batch(*predicted, token_types, cu_seqlens, samples, sentence_label)

    def _predicted(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, samples: np.ndarray, places: np.ndarray,
        words: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """The ids that the model is given, [T], where something is to be predicted, [M], and what, [M].

        `places` are those of the store's tokens, whose `words` says of each whether it continues the one before.
        """
        if self.objective in NEXT_WORD:
            positions = np.flatnonzero(~np.isin(input_ids[1:], self.special))
            return input_ids, positions, input_ids[positions + 1]
        continued = None if self.continues is None else self.continues[input_ids]
        if continued is not None and words is not None:
            continued[places] = words
        masked, positions, labels = mask_tokens(
            input_ids, cu_seqlens, samples, self.special, self.store.vocab_size, seed=self.seed, epoch=self.epoch,
            mask_prob=self.mask_prob, continued=continued, **self.masking,
        )  # fmt: skip
        return input_ids if self.objective == "plm" else masked, positions, labels

    def _batch(
        self, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray, token_types: np.ndarray,
        cu_seqlens: np.ndarray, samples: np.ndarray, sentence_label: np.ndarray | None,
    ) -> Batch:  # fmt: skip
        places, ranks = _ranges(np.diff(cu_seqlens)), {}
        if self.objective == "plm":
            made = permute(cu_seqlens, positions, samples, seed=self.seed, epoch=self.epoch)
            ids, token_types, places = ids[made.source], token_types[made.source], places[made.source]
            ids[made.queries] = self.special.mask
            cu_seqlens, positions = made.cu_seqlens, made.queries
            ranks = {name: torch.from_numpy(getattr(made, name)) for name in ("query_ranks", "key_ranks")}
        batch = Batch(
            input_ids=torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(token_types),
            position_ids=torch.from_numpy(places),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            masked_positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            sentence_label=None if sentence_label is None else torch.from_numpy(sentence_label),
            filled_tokens=len(ids),
            task_type_ids=None if self.task_type is None else torch.full((len(ids),), self.task_type),
            **ranks,
        )
        if self.shape is None:
            return batch
        return batch.padded(self.special.pad, self.shape, self.longest)._replace(max_seqlen=self.longest)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..lengths[0]-1, 0..lengths[1]-1, ... in one array."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)
