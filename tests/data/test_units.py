"""What is masked together: limits and whole words on drawn batches, and that one draw decides for a unit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data import SpecialIds, mask_tokens
from fastbert.data.masking import budget

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
V = 60
PIECES = np.arange(V) % 3 == 2  # ids 5, 8, 11, ... continue a word
CONTENTS = st.lists(st.integers(1, V - 1).filter(lambda i: i not in (2, 4)), max_size=60)


def pack(contents):
    samples = [[SPECIAL.cls, *content, SPECIAL.sep] for content in contents]
    return np.concatenate(samples), np.cumsum([0] + [len(s) for s in samples])


@settings(max_examples=150, deadline=None)
@given(
    contents=st.lists(CONTENTS, min_size=1, max_size=4), unit=st.sampled_from(["word", "ngram", "span"]),
    words=st.sampled_from([None, 0.0, 0.3, 0.9]), seed=st.integers(0, 2**64 - 1),
    share=st.sampled_from([0.15, 0.5, 0.9]),
)  # fmt: skip
def test_budget_special_tokens_and_whole_words(contents, unit, words, seed, share):
    """Words as any store may tell them: a token of any id goes on with a word, at a special token's side too."""
    ids, cu = pack(contents)
    continued = None if words is None else np.random.default_rng(seed).random(len(ids)) < words
    options = {"seed": seed, "epoch": 1, "mask_prob": share, "unit": unit, "continued": continued}
    masked, positions, labels = mask_tokens(ids, cu, np.arange(len(contents)), SPECIAL, V, **options)
    free = ~np.isin(ids, SPECIAL)
    assert free[positions].all() and (labels == ids[positions]).all() and (np.diff(positions) > 0).all()
    assert (np.delete(masked, positions) == np.delete(ids, positions)).all()
    assert not np.isin(masked[positions], [0, 1, 2, 3]).any(), "a special token as the random one"
    chosen = np.zeros(len(ids), bool)
    chosen[positions] = True
    wanted = budget(np.add.reduceat(free, cu[:-1]), share)
    taken = np.add.reduceat(chosen, cu[:-1])
    assert (taken <= wanted).all()
    assert (words or 0) > 0 or unit != "word" or (taken == wanted).all(), "words of one token fill the budget"
    # A word's pieces are chosen together, and but for n-grams all of them are [MASK] or none is.
    inside = np.append(False, free[1:] & free[:-1]) & (words is not None and continued)
    assert (chosen[inside] == chosen[np.flatnonzero(inside) - 1]).all()
    if unit != "ngram":
        hidden = masked == SPECIAL.mask
        assert (hidden[inside] == hidden[np.flatnonzero(inside) - 1]).all()
    # Each sample is what it is alone.
    for b, content in enumerate(contents):
        own = slice(cu[b], cu[b + 1])
        options["continued"] = None if words is None else continued[own]
        alone = mask_tokens(*pack([content]), np.array([b]), SPECIAL, V, **options)[0]
        assert (alone == masked[cu[b] : cu[b + 1]]).all()


@settings(max_examples=12, deadline=None)
@given(
    unit=st.sampled_from(["word", "ngram", "span"]), seed=st.integers(0, 2**64 - 1),
    shares=st.sampled_from([(0.8, 0.1), (0.5, 0.5), (0.1, 0.3), (1.0, 0.0)]),
)  # fmt: skip
def test_shares_of_units_are_within_binomial_bounds(unit, seed, shares):
    """Hidden, replaced and kept: of words each one draw, of n-grams each token one; a span's are at most 3 words' draw.

    Six standard deviations, so that a right masker fails once in many million examples.
    """
    rng = np.random.default_rng(seed)
    ids, cu = pack(rng.integers(5, V, (1500, 24)))
    continued = rng.random(len(ids)) < 0.4
    settings = {"mask_share": shares[0], "random_share": shares[1], "mask_prob": 0.13, "unit": unit, "epoch": 3}
    masked, positions, labels = mask_tokens(
        ids, cu, np.arange(1500), SPECIAL, V, seed=seed, continued=continued, **settings
    )
    counted = positions
    if unit == "word":  # one token of each
        starts = ~(np.append(False, continued[1:] & ~np.isin(ids[:-1], SPECIAL)))
        counted = positions[starts[positions]]
    draws = len(counted) if unit != "span" else len(counted) / 3  # of three tokens at most
    now, was = masked[counted], ids[counted]
    same = shares[1] / (V - 5)  # a random token that is the one that was there
    for share, found in (
        (shares[0], now == SPECIAL.mask),
        (shares[1] - same, (now != SPECIAL.mask) & (now != was)),
        (1 - sum(shares) + same, now == was),
    ):
        assert abs(found.mean() - share) <= 6 * np.sqrt(share * (1 - share) / draws) + 1e-9
    assert (labels == ids[positions]).all() and len(counted) > 1000


@pytest.mark.parametrize("unit", ["word", "ngram"])
def test_eight_ninths_and_tenths(unit):
    """Of words of three pieces: 80 % hidden, 10 % replaced and 10 % kept; n-grams draw for every piece of theirs."""
    words = np.tile([6, 8, 11], 10)
    ids, cu = pack([words] * 2000)
    masked, positions, labels = mask_tokens(
        ids, cu, np.arange(2000), SPECIAL, V, seed=3, epoch=0, mask_prob=0.1, unit=unit, continued=PIECES[ids]
    )
    now, was = masked[positions].reshape(-1, 3), labels.reshape(-1, 3)
    assert len(now) == 2000
    hidden, kept = now == SPECIAL.mask, now == was
    n, draws = (2000, slice(0, 1)) if unit == "word" else (6000, slice(0, 3))
    for share, those in ((0.8, hidden), (0.1 + 0.1 / 55, kept)):  # one of 55 random tokens is the one that was there
        assert abs(those[:, draws].mean() - share) < 5 * np.sqrt(share * (1 - share) / n)
    together = (hidden.all(1) | ~hidden.any(1)).mean()
    assert together == 1 if unit == "word" else abs(together - (0.8**3 + 0.2**3)) < 5 * np.sqrt(0.25 / 2000)
    replaced = now[~hidden.any(1) & (now != was).all(1)] if unit == "word" else now[:0]
    assert unit == "ngram" or len(np.unique(replaced)) == 55, "each piece by a random token of its own"


def test_spans_are_as_long_as_spanberts():
    """One to ten words, 3.8 on average; in a budget of two of forty, more than half of the time a span begins."""
    weights = 0.2 * 0.8 ** np.arange(10)
    assert np.average(np.arange(1, 11), weights=weights) == pytest.approx(3.797, abs=1e-3)
    ids, cu = pack([[5] * 40] * 2000)
    _, positions, _ = mask_tokens(ids, cu, np.arange(2000), SPECIAL, V, seed=5, epoch=0, mask_prob=0.05, unit="span")
    neighbours = (np.diff(positions.reshape(2000, 2), axis=1) == 1).mean()
    longer = 1 - weights[0] / weights.sum()
    # Two words or more drawn, not at the end; or one, the next beside it.
    share = longer * 39 / 40 + (1 - longer) * 2 / 40
    assert abs(neighbours - share) < 5 * np.sqrt(share * (1 - share) / 2000)
