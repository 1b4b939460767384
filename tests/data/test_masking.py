"""Dynamic masking: counts by hand, shares over many samples, independence of the batch."""

import numpy as np
import pytest

from fastbert.data import SpecialIds, mask_tokens

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
V = 1000


def pack(*contents):
    """[CLS] content [SEP] for each, packed: ids and cu_seqlens."""
    samples = [[SPECIAL.cls, *content, SPECIAL.sep] for content in contents]
    return np.concatenate(samples), np.cumsum([0] + [len(s) for s in samples])


def mask(ids, cu, samples, special=SPECIAL, vocab_size=V, seed=7, epoch=0, **shares):
    return mask_tokens(ids, cu, np.asarray(samples), special, vocab_size, seed=seed, epoch=epoch, **shares)


@pytest.mark.parametrize(
    ("n", "chosen"),
    [(0, 0), (1, 1), (2, 1), (3, 1), (9, 1), (10, 2), (11, 2), (16, 2), (17, 3), (20, 3), (100, 15), (126, 19)],
)
def test_counts(n, chosen):
    """max(1, round(0.15 n)), halves to even as Python rounds, and none where there is nothing to choose."""
    ids, cu = pack([50] * 8, range(10, 10 + n), [60])
    masked, positions, labels = mask(ids, cu, [3, 1, 2])
    assert np.histogram(positions, cu)[0].tolist() == [1, chosen, 1]
    assert labels.tolist() == ids[positions].tolist()
    assert (np.diff(positions) > 0).all()
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert np.array_equal(masked[untouched], ids[untouched])
    assert positions.dtype == labels.dtype == masked.dtype == np.int64


def test_special_tokens_are_never_chosen():
    ids, cu = pack([0, 1, 4, 3, 2, 500, 1], [1, 1])
    for sample in range(200):
        _, positions, labels = mask(ids, cu, [sample, sample + 1000])
        assert positions.tolist() == [6] and labels.tolist() == [500]


def test_shares_and_uniform_random_tokens():
    rng = np.random.default_rng(0)
    ids, cu = pack(*rng.integers(5, V, (2000, 100)))
    masked, positions, labels = mask(ids, cu, range(2000))
    m = len(positions)
    assert m == 2000 * 15
    now = masked[positions]
    replaced = (now != SPECIAL.mask) & (now != labels)
    # Five standard deviations of a share p of m: 5 * sqrt(p * (1 - p) / m).
    assert abs((now == SPECIAL.mask).mean() - 0.8) < 5 * np.sqrt(0.16 / m)
    assert abs(replaced.mean() - 0.1) < 5 * np.sqrt(0.09 / m) + 0.1 / V
    random = now[replaced]
    assert random.min() >= 5 and random.max() < V
    # 3,000 draws in ten equal classes of the 995 ordinary tokens.
    counts = np.histogram(random, np.linspace(5, V, 11))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 33.7  # chi square, 9 degrees, p = 1e-4
    # Every place of the sample is equally likely.
    places = np.bincount(positions - np.repeat(cu[:-1], 15) - 1, minlength=100)
    assert ((places - 300) ** 2 / 300).sum() < 161  # chi square, 99 degrees, p = 1e-4


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_one_kind_only(mask_share, random_share):
    ids, cu = pack(range(5, 205))
    masked, positions, labels = mask(ids, cu, [0], mask_prob=0.5, mask_share=mask_share, random_share=random_share)
    assert len(positions) == 100
    now = masked[positions]
    if mask_share:
        assert (now == SPECIAL.mask).all()
    elif random_share:
        assert (now != SPECIAL.mask).all() and (now != labels).sum() > 90
    else:
        assert np.array_equal(now, labels)


def test_special_ids_anywhere_are_never_the_random_token():
    """BERT's own vocabulary has them at 0 and 100 to 103; with 10 ids all but five are ordinary."""
    special = SpecialIds(pad=0, unk=4, cls=5, sep=6, mask=9)
    ids, cu = pack(*[[1, 2, 3, 7, 8] * 20] * 50)
    ids[ids == SPECIAL.cls], ids[cu[1:] - 1] = 2, special.sep
    masked, positions, _ = mask(ids, cu, range(50), special, 10, mask_prob=0.9, mask_share=0.0, random_share=1.0)
    assert set(masked[positions].tolist()) == {1, 2, 3, 7, 8}


def test_depends_on_the_sample_and_not_on_the_batch():
    contents = [range(100, 100 + n) for n in (30, 7, 64, 2)]
    ids, cu = pack(*contents)
    together, positions, _ = mask(ids, cu, [11, 12, 13, 14])
    for b, content in enumerate(contents):
        alone, own, _ = mask(*pack(content), [11 + b])
        assert np.array_equal(alone, together[cu[b] : cu[b + 1]])
        assert np.array_equal(own + cu[b], positions[(positions >= cu[b]) & (positions < cu[b + 1])])


@pytest.mark.parametrize("change", [{"seed": 8}, {"seed": 7 + (1 << 32)}, {"epoch": 1}, {"samples": [1]}])
def test_depends_on_seed_epoch_and_sample(change):
    ids, cu = pack(range(100, 200))
    first = mask(ids, cu, [0])
    other = mask(ids, cu, change.get("samples", [0]), **{k: v for k, v in change.items() if k != "samples"})
    assert not np.array_equal(first[1], other[1])
    assert np.array_equal(first[1], mask(ids, cu, [0])[1])
