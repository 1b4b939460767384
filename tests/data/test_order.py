"""The order of an epoch's samples: a permutation of all, computed in parts, random over the whole."""

import numpy as np
import pytest

from fastbert.data.order import BLOCK, at_places


@pytest.mark.parametrize("count", [1, 2, 1000, BLOCK, BLOCK + 1, 100_000, 1 << 17, 300_001])
def test_every_item_comes_once_and_parts_are_those_of_the_whole(count):
    whole = at_places(0, count, count, seed=7, epoch=2)
    assert np.array_equal(np.sort(whole), np.arange(count))
    first, last = count // 3, min(count, count // 3 + 1000)
    assert np.array_equal(at_places(first, last, count, seed=7, epoch=2), whole[first:last])
    if count > 2:
        for other in ({"seed": 8, "epoch": 2}, {"seed": 7, "epoch": 3}):
            assert (at_places(0, count, count, **other) == whole).mean() < 0.01


def test_the_order_is_random_over_the_whole():
    """Sixteenths of the places have items of every sixteenth, and neighbours are no neighbours, as by chance."""
    count = 200_000
    items = at_places(0, count, count, seed=0, epoch=0)
    cells = np.histogram2d(np.arange(count), items, bins=16)[0]
    chance = count / 256
    assert (np.abs(cells - chance) < 5 * chance**0.5).all()
    assert (((cells - chance) ** 2).sum() / chance) == pytest.approx(15 * 15, abs=5 * (2 * 225) ** 0.5)
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.01
    assert np.mean(np.abs(np.diff(items)) == 1) < 1e-4
    for bit in range(17):
        assert np.corrcoef(items >> bit & 1, np.arange(count) >> bit & 1)[0, 1] == pytest.approx(0, abs=0.012)
