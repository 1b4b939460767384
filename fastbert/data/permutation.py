"""Permutation language modelling: words predicted in a random order, each from what comes before it there.

The words to be predicted come last in the order of their sample, the others before all of them, as in the paper, which
predicts the last sixth. The text itself stays as it is. Behind the tokens of a sample stands a query for each of those
words, with its place and its segment; of it the word is predicted (`XLNetLMHeadModel`). Who sees whom follows from
ranks: a key whose rank is at most the query's.

    [CLS] the cat sat [SEP]        "cat" is predicted first, then "the", so the numbers in the order are
     -1    1   0  -1   -1          (-1: not predicted)

                [CLS]  the  cat  sat  [SEP]  query for "the"  query for "cat"
    key rank      -1     1    0   -1   -1    UNSEEN           UNSEEN
    query rank    -1     1    0   -1   -1         0               -1

Source: Yang et al., "XLNet" (2019).
"""

from typing import NamedTuple

import numpy as np

from fastbert.data.draws import Purpose, draw
from fastbert.data.masking import budget
from fastbert.models.two_streams import UNSEEN

SHARE = 1 / 6  # of the words that can be predicted: the paper's K = 6


def most_queries(seq_len: int) -> int:
    """Of a sample with so many tokens, [CLS] and [SEP] among them."""
    return int(budget(np.array(seq_len - 2), SHARE))


class Permuted(NamedTuple):
    """B samples with their queries, T tokens and M queries in all.

    Attributes:
        source: int64 [T + M], which token of the batch without queries each one is, or predicts.
        cu_seqlens: int64 [B + 1].
        queries: int64 [M], places in the batch, ascending.
        query_ranks, key_ranks: int32 [T + M].
    """

    source: np.ndarray
    cu_seqlens: np.ndarray
    queries: np.ndarray
    query_ranks: np.ndarray
    key_ranks: np.ndarray


def permute(cu_seqlens: np.ndarray, targets: np.ndarray, samples: np.ndarray, *, seed: int, epoch: int) -> Permuted:
    """An order for the targets of each sample, a function of (seed, epoch, its number, their places).

    Args:
        cu_seqlens: integers [B + 1] of T tokens. targets: int64 [M], places in the packed tokens, ascending.
        samples: int64 [B], the samples' numbers.
    """
    lengths = np.diff(cu_seqlens)
    sample = np.repeat(np.arange(len(samples)), lengths)  # of each token
    own = sample[targets]
    keys, *_ = draw(Purpose.PERMUTE, seed, epoch, samples[own], targets - cu_seqlens[:-1][own])
    counts = np.bincount(own, minlength=len(samples))
    first = np.cumsum(counts) - counts  # target of each sample
    number = np.empty(len(targets), np.int64)
    number[np.lexsort((keys, own))] = np.arange(len(targets)) - np.repeat(first, counts)

    bounds = np.append(0, np.cumsum(lengths + counts))
    content = np.arange(len(sample)) + first[sample]  # where the tokens go
    queries = np.arange(len(targets)) + cu_seqlens[1:][own]  # and their queries
    source = np.empty(bounds[-1], np.int64)
    source[content], source[queries] = np.arange(len(sample)), targets
    query_ranks = np.full(bounds[-1], -1, np.int32)
    query_ranks[content[targets]], query_ranks[queries] = number, number - 1
    key_ranks = query_ranks.copy()
    key_ranks[queries] = UNSEEN
    return Permuted(source, bounds, queries, query_ranks, key_ranks)
