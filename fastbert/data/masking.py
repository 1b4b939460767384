"""Dynamic masking for masked-language modelling, a pure function of (seed, epoch, sample, place).

Of the n tokens of a sample that are not special at most max(1, round(0.15 n)) are chosen, in units; of these 80 %
become [MASK], 10 % random tokens, 10 % stay. A unit is one word or several in a row, and a word is a token, or what the
vocabulary (`continuations`) or a store with `Words` say. Sources: Devlin et al., "BERT" (2019), its
`create_pretraining_data.py` and its whole word masking; drawn anew every epoch as in Liu et al., "RoBERTa" (2019);
n-grams as in Lan et al., "ALBERT" (2020), and its program of that name; spans as in Joshi et al., "SpanBERT" (2020).

Those programs count [CLS] and [SEP] among the n, choose at most 20 tokens of a sample by default, may choose [UNK], and
draw the random token from the whole vocabulary. Here the share is one of the tokens that can be predicted, the same for
samples of every length; packed batches have no fixed number of places that would need a limit.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fastbert.data.draws import Purpose, below, draw
from fastbert.data.tokenizer import SpecialIds

Unit = Literal["word", "ngram", "span"]


class _Kind(NamedTuple):
    """Of units.

    Attributes:
        lengths: cumulative probabilities of one word, two words and so on.
        together: whether one draw decides that all of its tokens become [MASK], random ones or stay, as SpanBERT has
            it, or one draw for each of them, as ALBERT's program has it.
    """

    lengths: np.ndarray
    together: bool


def _cumulative(weights: Sequence[float]) -> np.ndarray:
    sums = np.cumsum(weights)
    return sums / sums[-1]


_KINDS: dict[Unit, _Kind] = {
    "word": _Kind(_cumulative([1]), together=True),
    "ngram": _Kind(_cumulative([1 / n for n in (1, 2, 3)]), together=False),
    "span": _Kind(_cumulative([0.8**n for n in range(10)]), together=True),  # 0.2 * 0.8**n, 3.8 words on average
}


def mask_tokens(
    input_ids: np.ndarray,
    cu_seqlens: np.ndarray,
    samples: np.ndarray,
    special: SpecialIds,
    vocab_size: int,
    *,
    seed: int,
    epoch: int,
    mask_prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    unit: Unit = "word",
    continued: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks a packed batch of B samples with T tokens, all samples at once.

    A sample's masks depend on (seed, epoch, its number, its tokens), not on its neighbours in the batch.

    Args:
        input_ids: int64 [T].
        cu_seqlens: integers [B + 1], sample b is input_ids[cu_seqlens[b] : cu_seqlens[b + 1]], none empty.
        samples: int64 [B], the samples' numbers.
        special: ids that are never chosen and never the random token.
        mask_prob: share of tokens to choose.
        mask_share, random_share: shares of the chosen that become [MASK] and a random token.
        unit: what is masked together: "word", one word; "ngram", one, two or three with weights 1, 1/2 and 1/3, each
            token of which is masked, replaced or kept for itself; "span", one to ten with weights 0.8**n. Of words and
            spans all tokens are masked, all are replaced (each by a random one of its own), or all are kept.
        continued: bool [T], whether a token continues the word of the one before. None for none: every token is a word.

    Returns:
        New ids int64 [T]; the chosen positions int64 [M], ascending; the original ids there, int64 [M].
    """
    lengths = np.diff(cu_seqlens)
    sample = np.repeat(np.arange(len(samples)), lengths)
    place = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    keys, actions, replacements, lengths_drawn = draw(Purpose.MASK, seed, epoch, samples[sample], place)

    is_special = np.zeros(vocab_size, bool)
    is_special[list(special)] = True
    fixed = is_special[input_ids]
    n = lengths - np.add.reduceat(fixed, cu_seqlens[:-1], dtype=np.int64)
    wanted = budget(n, mask_prob)  # of each sample
    if unit == "word" and continued is None:
        # Within each sample the free tokens come first, in random order; the first few are chosen.
        order = np.argsort((sample << 33) | (fixed.astype(np.int64) << 32) | keys, kind="stable")
        positions = heads = np.sort(order[place < wanted[sample]])
    else:
        continued = np.zeros(len(input_ids), bool) if continued is None else continued
        longer = np.searchsorted(_KINDS[unit].lengths, lengths_drawn / 2.0**32, "right")
        positions, heads = _choose_units(sample, fixed, continued, keys, longer, wanted)

    labels = input_ids[positions]
    action = actions[heads if _KINDS[unit].together else positions] / 2.0**32
    random_ids = below(replacements[positions], vocab_size - len(set(special)))
    for i in sorted(set(special)):
        random_ids += random_ids >= i
    masked = input_ids.copy()
    masked[positions] = np.select(
        [action < mask_share, action < mask_share + random_share], [special.mask, random_ids], labels
    )
    return masked, positions, labels


def budget(n: np.ndarray, mask_prob: float = 0.15) -> np.ndarray:
    """How many of n tokens that are not special are chosen, at most: max(1, round(mask_prob * n)), 0 of none."""
    return np.minimum(n, np.maximum(1, np.rint(n * mask_prob))).astype(np.int64)


def _choose_units(
    sample: np.ndarray,
    fixed: np.ndarray,
    continued: np.ndarray,
    keys: np.ndarray,
    longer: np.ndarray,
    wanted: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of units of whole words, in random order until a sample has as many tokens as it should.

    At every word a unit may begin; it ends before a special token (in ALBERT's program an n-gram, and even a word, runs
    on behind the [SEP] between two texts). One that would exceed the number of tokens loses words from its end, and is
    left out where one word is too many already; so is one that meets a word already chosen. A sample may get fewer
    tokens than it should, none even.

    Args:
        sample: int64 [T], ascending. fixed: bool [T], never chosen. continued: bool [T], part of the word before.
        keys: words [T] that decide the order. longer: int64 [T], how many words more than one a unit has that begins
            there.
        wanted: int64 [B], tokens of each sample.

    Returns:
        The positions int64 [M], ascending, and of each the first of its unit, int64 [M].
    """
    tokens = len(sample)
    same = sample[1:] == sample[:-1]
    inside = np.append(False, same & ~fixed[1:] & ~fixed[:-1])  # a free token behind a free one of its sample
    starts = np.flatnonzero(~fixed & ~(inside & continued))  # of words
    # Where n words end that begin with a word, [words, n]: at most where its run of free tokens does.
    runs = np.append(np.flatnonzero(~inside), tokens)
    run_end = runs[np.searchsorted(runs, starts, "right")]
    most = int(longer.max(initial=0)) + 1
    following = np.stack([np.append(starts[n:], [tokens] * n)[: len(starts)] for n in range(1, most + 1)], 1)
    ends = np.minimum(following, run_end[:, None])

    order = np.lexsort((keys[starts], sample[starts]))
    left, head = wanted.tolist(), np.full(tokens, -1)
    for start, b, words, n in zip(
        *(x[order].tolist() for x in (starts, sample[starts], ends, longer[starts])), strict=True
    ):  # one after another, as each depends on those before
        if left[b]:
            end = next((end for end in reversed(words[: n + 1]) if end - start <= left[b]), start)
            if end > start and (head[start:end] < 0).all():
                head[start:end] = start
                left[b] -= end - start
    positions = np.flatnonzero(head >= 0)
    return positions, head[positions]
