"""Triton's random numbers, of rows and of attention's scores: bit for bit those of fastbert.ops.philox."""

import pytest
import torch

from fastbert.ops import philox as truth

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastbert.kernels import philox

pytestmark = pytest.mark.usefixtures("interpreted")


@triton.jit
def rows(keep_ptr, lanes_ptr, seed_ptr, bound, first, R: tl.constexpr, C: tl.constexpr):
    row = first + tl.arange(0, R)[:, None]
    group = tl.arange(0, C // 8)[None, :]
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    seed = tl.load(seed_ptr)
    tl.store(keep_ptr + at, philox.keep_row(group, row, seed, bound))
    tl.store(lanes_ptr + at, (philox.row_lanes(group, row, 5, 6, seed) >> 16).to(tl.int32))


@triton.jit
def scores(keep_ptr, transposed_ptr, seed_ptr, bound, key, query, head, Q: tl.constexpr, K: tl.constexpr):
    at = tl.arange(0, Q)[:, None] * K + tl.arange(0, K)[None, :]
    seed, s = tl.load(seed_ptr), tl.zeros([Q, K], tl.float32) - 1.5
    tl.store(keep_ptr + at, philox.keep_scores(s, key, query + tl.arange(0, Q), head, seed, bound))
    tl.store(transposed_ptr + tl.trans(at), philox.keep_scores_transposed(tl.trans(s), key, query, head, seed, bound))


@pytest.mark.parametrize("seed", [0x123456789ABCDEF, -5])
def test_rows(seed):
    seed = torch.tensor([seed])
    for t in (1, 6554, 65535, 65536):
        keep, lanes = torch.empty(4, 64, dtype=torch.bool), torch.empty(4, 64, dtype=torch.int32)
        rows[(1,)](keep, lanes, seed, philox.bound(t, 16), 100, R=4, C=64)
        row = torch.arange(100, 104).unsqueeze(1)
        assert torch.equal(keep, truth.lanes(64, row, 0, 0, seed) >= t)
        assert torch.equal(lanes.long(), truth.lanes(64, row, 5, 6, seed))


# With 64 keys, or queries, to a tile the counters are laid out as a product is.
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 64), (32, 128), (128, 32)])
def test_scores(queries, keys):
    seed = torch.tensor([2**40 + 3])
    for t in (1, 26, 256):
        keep, transposed = torch.empty(2, queries, keys, dtype=torch.bool)
        scores[(1,)](keep, transposed, seed, philox.bound(t, 8), 32, 1000, 3, Q=queries, K=keys)
        query = torch.arange(1000, 1000 + queries).unsqueeze(1)
        expected = truth.lanes(32 + keys, query, 3, 1, seed, bits=8)[:, 32:] >= t
        assert torch.equal(keep, expected) and torch.equal(transposed, expected)


def test_scales_are_the_contracts():
    assert [philox.scale(t, 16) for t in (0, 1, 6554, 65536)] == [truth.scale(t) for t in (0, 1, 6554, 65536)]
    assert philox.scale(26, 8) == truth.scale(26, 8) == 256 / 230
    assert philox.bound(1, 16) == 0xFFFF and philox.bound(65536, 16) == philox.bound(256, 8) == -1
