"""Samples: spans of a document's sentences, and the pairs of next-sentence or sentence-order prediction made of them.

A sample is a range of the store's tokens. How a document is cut into samples does not change from epoch to epoch; where
a sample is cut in two, and whether its second half is replaced or its halves are swapped, does.
"""

from array import array
from typing import NamedTuple

import numpy as np

from fastbert.data.draws import Purpose, below, draw
from fastbert.data.store import TokenStore

_WINDOW = 1 << 20  # items looked at together


def cut_greedily(
    offsets: np.ndarray, limit: int, barriers: np.ndarray | None = None, ends: np.ndarray | None = None
) -> np.ndarray:
    """Cuts items in a row into spans, each as many as fit in `limit`, and at least one.

    Args:
        offsets: int64 [N + 1], ascending; item i covers offsets[i] to offsets[i + 1].
        limit: largest offsets[end] - offsets[start] of a span of several items.
        barriers: offsets, ascending, the last one offsets[-1], that no span crosses; None for none.
        ends: int64 [N + 1], ascending, what counts in place of offsets where a span ends; None for offsets.

    Returns:
        int64 [spans + 1], indices into offsets where the spans begin and end.
    """
    n, i = len(offsets) - 1, 0
    ends = offsets if ends is None else ends
    cuts = array("q", [0])
    while i < n:
        first, last = i, min(i + _WINDOW, n)
        start = offsets[first:last]
        end = start + limit
        if barriers is not None:
            end = np.minimum(end, barriers[np.searchsorted(barriers, start, "right")])
        # Where a span ends that starts at an item, for all items; then only the chain of starts is walked.
        following = np.maximum(np.searchsorted(ends, end, "right") - 1, np.arange(first, last) + 1).tolist()
        while i < last:
            i = following[i - first]
            cuts.append(i)
    return np.frombuffer(cuts, np.int64)


class Spans(NamedTuple):
    """Samples as token ranges: int64 [samples] each."""

    starts: np.ndarray
    ends: np.ndarray


def find_spans(store: TokenStore, limit: int, shortest: int = 1) -> Spans:
    """All samples of a store: sentences of one document, as many as fit in `limit` tokens.

    A sentence longer than `limit` is cut, and its last part goes on with the sentences that follow. Spans of fewer than
    `shortest` tokens are left out.
    """
    starts, ends = [], []
    for first_token, sentences, documents in store.shards():
        offsets, barriers = _cut_long(sentences, limit), sentences[documents]
        cuts = offsets[cut_greedily(offsets, limit, barriers)] + first_token
        kept = np.diff(cuts) >= shortest
        starts.append(cuts[:-1][kept])
        ends.append(cuts[1:][kept])
    return Spans(np.concatenate(starts), np.concatenate(ends))


def find_rows(store: TokenStore, seq_len: int, extra: int) -> tuple[Spans, np.ndarray]:
    """Rows of whole sentences, as many as fit, on into the next document; a row's part of each document is a sample.

    These are the FULL-SENTENCES of Liu et al., "RoBERTa" (2019), where a row is one sequence and its documents see each
    other. Each sample has `extra` tokens beside its own, and a row at most `seq_len` in all; a sentence that is longer
    is cut. No row goes on into the next shard of the store.

    Returns:
        The samples, which hold all tokens of the store; int64 [rows + 1], the first sample of every row, and how many
        there are.
    """
    starts, ends, firsts, count = [], [], [], 0
    for first_token, sentences, shard_documents in store.shards():
        offsets, documents = _cut_long(sentences, seq_len - extra), sentences[shard_documents]
        # `extra` tokens for each document that a row has something of: those that begin before its end, without those
        # that ended before its start.
        begun, ended = np.searchsorted(documents, offsets, "left"), np.searchsorted(documents, offsets, "right") - 1
        rows = offsets[cut_greedily(offsets + extra * ended, seq_len, ends=offsets + extra * begun)]
        bounds = np.union1d(rows, documents)
        starts.append(bounds[:-1] + first_token)
        ends.append(bounds[1:] + first_token)
        firsts.append(np.searchsorted(bounds, rows[:-1]) + count)
        count += len(bounds) - 1
    return Spans(np.concatenate(starts), np.concatenate(ends)), np.append(np.concatenate(firsts), count)


def _cut_long(offsets: np.ndarray, limit: int) -> np.ndarray:
    """Offsets of sentences, of which those longer than `limit` are cut into several."""
    lengths = np.diff(offsets)
    if lengths.max(initial=0) <= limit:
        return offsets
    parts = -(-lengths // limit)
    first = np.cumsum(parts) - parts
    part = np.arange(parts.sum()) - np.repeat(first, parts)
    return np.append(np.repeat(offsets[:-1], parts) + part * limit, offsets[-1])


class Pairs(NamedTuple):
    """Two segments per sample: int64 [B, 2] starts and lengths in the store's tokens, and labels int64 [B]."""

    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def draw_next_pairs(store: TokenStore, spans: Spans, samples: np.ndarray, seed: int, epoch: int) -> Pairs:
    """Cuts samples into A and B and replaces half of the Bs: label 0 where B follows A, 1 where it is random.

    They are cut as `_cut` says. (BERT's own program makes single sentences always random pairs, so that the label could
    be told from the number of sentences.) A random B
    starts at a random sentence of another document and takes whole sentences, no longer together than the B it
    replaces; a first sentence longer than that is cut. Documents are drawn in proportion to their length, as they occur
    among the Bs that are kept, so that the kind of document does not tell the label.

    Source: Devlin et al., "BERT" (2019). The store must hold two documents; spans must have two tokens.
    """
    start, end = spans.starts[samples], spans.ends[samples]
    cut_word, coin, high, low = draw(Purpose.PAIR, seed, epoch, samples)
    cut = _cut(store, start, end, cut_word)
    length = end - cut

    # A random token of another document, and the sentence around it.
    own = store.sentences.searchsorted(start, "right") - 1
    own = store.documents.searchsorted(own, "right") - 1
    own_start, own_end = (store.sentences[store.documents[own + i]] for i in (0, 1))
    others = store.sentences[-1] - (own_end - own_start)
    token = ((high + low / 2.0**32) / 2.0**32 * others).astype(np.int64).clip(max=others - 1)
    token += np.where(token >= own_start, own_end - own_start, 0)
    sentence = store.sentences.searchsorted(token, "right") - 1
    document = store.documents.searchsorted(sentence, "right") - 1
    document_end = store.sentences[store.documents[document + 1]]
    # Moved forward in its document until the rest is long enough.
    latest = store.sentences.searchsorted(document_end - length, "right") - 1
    sentence = np.minimum(sentence, np.maximum(latest, store.documents[document]))
    random_start = store.sentences[sentence]
    last = store.sentences.searchsorted(np.minimum(random_start + length, document_end), "right") - 1
    random_end = np.where(last > sentence, store.sentences[last], random_start + length)

    labels = (coin >= 1 << 31).astype(np.int64)
    starts = np.stack((start, np.where(labels, random_start, cut)), 1)
    lengths = np.stack((cut - start, np.where(labels, random_end - random_start, length)), 1)
    return Pairs(starts, lengths, labels)


def draw_ordered_pairs(store: TokenStore, spans: Spans, samples: np.ndarray, seed: int, epoch: int) -> Pairs:
    """Cuts samples into A and B and swaps half of the pairs: label 0 where they are in order, 1 where B comes first.

    They are cut as `_cut` says. ALBERT's own program differs in what it puts into a sample, not in how it draws: it
    collects sentences until they are too many and cuts tokens off either end, where here a sample takes those that fit
    and no text is lost; it shortens the samples of every tenth document, where here samples are packed as long as they
    are, and the ends of documents are short ones; and it gives a single sentence a random second text with label 1,
    where here the halves of one are in order or not like all others.

    Source: Lan et al., "ALBERT" (2020), and its `create_pretraining_data.py`. Spans must have two tokens.
    """
    start, end = spans.starts[samples], spans.ends[samples]
    cut_word, coin, *_ = draw(Purpose.PAIR, seed, epoch, samples)
    cut = _cut(store, start, end, cut_word)
    labels = (coin >= 1 << 31).astype(np.int64)
    starts, lengths = np.stack((start, cut), 1), np.stack((cut - start, end - cut), 1)
    swapped = labels[:, None] == 1
    return Pairs(np.where(swapped, starts[:, ::-1], starts), np.where(swapped, lengths[:, ::-1], lengths), labels)


def _cut(store: TokenStore, start: np.ndarray, end: np.ndarray, word: np.ndarray) -> np.ndarray:
    """Where samples are cut in two: at a random sentence boundary, in a single sentence at a random token."""
    first = store.sentences.searchsorted(start, "right")
    boundaries = store.sentences.searchsorted(end, "left") - first
    return np.where(
        boundaries > 0,
        store.sentences[first + below(word, boundaries)],
        start + 1 + below(word, end - start - 1),
    )
