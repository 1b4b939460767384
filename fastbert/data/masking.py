"""Dynamic masking for masked-language modelling, a pure function of (seed, epoch, sample, place).

Of the n tokens of a sample that are not special max(1, round(0.15 n)) are chosen, one by one or in n-grams of words; of
these 80 % become [MASK], 10 % a random token, 10 % stay. Sources: Devlin et al., "BERT" (2019), and its
`create_pretraining_data.py`; drawn anew every epoch as in Liu et al., "RoBERTa" (2019); n-grams as in Lan et al.,
"ALBERT" (2020), and its program of that name.

Those programs count [CLS] and [SEP] among the n, choose at most 20 tokens of a sample by default, may choose [UNK], and
draw the random token from the whole vocabulary. Here the share is one of the tokens that can be predicted, the same for
samples of every length; packed batches have no fixed number of places that would need a limit.
"""

import numpy as np

from fastbert.data.draws import Purpose, below, draw
from fastbert.data.tokenizer import SpecialIds

LONGEST_NGRAM = 3  # words
_NGRAMS = np.cumsum([1 / n for n in range(1, LONGEST_NGRAM + 1)])  # cumulative weights 1/n of the lengths
_NGRAMS /= _NGRAMS[-1]


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
    continues: np.ndarray | None = None,
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
        continues: bool [V], whether an id continues the word before it: whole words are masked, in n-grams (see
            `_choose_ngrams`). None chooses tokens one by one.

    Returns:
        New ids int64 [T]; the chosen positions int64 [M], ascending; the original ids there, int64 [M].
    """
    lengths = np.diff(cu_seqlens)
    sample = np.repeat(np.arange(len(samples)), lengths)
    place = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    keys, actions, replacements, ngrams = draw(Purpose.MASK, seed, epoch, samples[sample], place)

    is_special = np.zeros(vocab_size, bool)
    is_special[list(special)] = True
    fixed = is_special[input_ids]
    n = lengths - np.add.reduceat(fixed, cu_seqlens[:-1], dtype=np.int64)
    wanted = budget(n, mask_prob)  # of each sample
    if continues is None:
        # Within each sample the free tokens come first, in random order; the first few are chosen.
        order = np.argsort((sample << 33) | (fixed.astype(np.int64) << 32) | keys, kind="stable")
        positions = np.sort(order[place < wanted[sample]])
    else:
        positions = _choose_ngrams(sample, fixed, continues[input_ids], keys, ngrams, wanted)

    labels = input_ids[positions]
    action = actions[positions] / 2.0**32
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


def _choose_ngrams(
    sample: np.ndarray,
    fixed: np.ndarray,
    continues: np.ndarray,
    keys: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
) -> np.ndarray:
    """Positions of n-grams of whole words, in random order until a sample has as many tokens as it should.

    At every word an n-gram may begin, of one, two or three words with weights 1, 1/2 and 1/3; it ends before a special
    token (in ALBERT's program an n-gram, and even a word, runs on behind the [SEP] between two texts). One that would
    exceed the number of tokens loses words from its end, and is left out where one word is too many already; so is one
    that meets a word already chosen. A sample may get fewer tokens than it should, none even.

    Args:
        sample: int64 [T], ascending. fixed: bool [T], never chosen. continues: bool [T], part of the word before.
        keys, lengths: words [T] that decide the order and the n-grams' lengths.
        wanted: int64 [B], tokens of each sample.
    """
    tokens = len(sample)
    same = sample[1:] == sample[:-1]
    inside = np.append(False, same & ~fixed[1:] & ~fixed[:-1])  # a free token behind a free one of its sample
    starts = np.flatnonzero(~fixed & ~(inside & continues))  # of words
    # Where n words end that begin with a word, [words, 3]: at most where its run of free tokens does.
    runs = np.append(np.flatnonzero(~inside), tokens)
    run_end = runs[np.searchsorted(runs, starts, "right")]
    following = np.stack([np.append(starts[n:], [tokens] * n)[: len(starts)] for n in range(1, LONGEST_NGRAM + 1)], 1)
    ends = np.minimum(following, run_end[:, None])
    drawn = np.searchsorted(_NGRAMS, lengths[starts] / 2.0**32, "right")  # 0 for a single word

    order = np.lexsort((keys[starts], sample[starts]))
    left, taken = wanted.tolist(), np.zeros(tokens, bool)
    for start, b, words, n in zip(
        *(x[order].tolist() for x in (starts, sample[starts], ends, drawn)), strict=True
    ):  # one after another, as each depends on those before
        if left[b]:
            end = next((end for end in reversed(words[: n + 1]) if end - start <= left[b]), start)
            if end > start and not taken[start:end].any():
                taken[start:end] = True
                left[b] -= end - start
    return np.flatnonzero(taken)
