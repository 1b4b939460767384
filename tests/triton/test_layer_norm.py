"""LayerNorm's Triton kernels: what few rows of short tests do not reach. The rest is tests/ops/test_layer_norm.py."""

import pytest
import torch

import fastbert
from fastbert.ops.layer_norm import reference
from fastbert.testing import assert_close

pytest.importorskip("triton")
from fastbert.kernels import layer_norm as kernels
from fastbert.kernels import layer_norm_long as long

pytestmark = pytest.mark.usefixtures("interpreted")
SEED, T, EPS = torch.tensor([77]), 20_000, 1e-5


def assert_forward_and_backward(shape, dtype):
    """All results with dropout and residual against the twin in float64; backward gives the same bits twice."""
    x, residual, dy, dy2 = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias, x_bias = torch.randn(3, shape[-1])
    given = x, x_bias, residual, weight, bias
    forward = kernels.layer_norm_forward(*given, EPS, T, SEED)
    twin = reference.layer_norm_forward(*given, EPS, T, SEED)
    truth = reference.layer_norm_forward(*(each.double() for each in given), EPS, T, SEED)
    for name, *each in zip(("y", "z", "mean", "rstd"), forward, twin, truth, strict=True):
        assert_close(*each, what=name)
    assert torch.equal(kernels.layer_norm(*given, EPS, T, SEED), forward[0])
    _, z, mean, rstd = forward
    given, mask = (dy, dy2, z, weight, mean, rstd), (T, SEED, True)
    backward = kernels.layer_norm_backward(*given, *mask)
    truth = reference.layer_norm_backward(*(each.double() for each in given), *mask)
    *theirs, _ = reference.layer_norm_backward(*given, *mask)
    theirs.append(theirs[1].sum(0, dtype=torch.float32))  # as torch, long rows add up what was rounded
    for name, *each in zip(("dz", "dx", "dweight", "dbias", "dx_bias"), backward, theirs, truth, strict=True):
        assert_close(*each, what=name)
    for a, b in zip(backward, kernels.layer_norm_backward(*given, *mask), strict=True):
        assert torch.equal(a, b)


PLANS = {
    "rows a warp each": {"warps": 1, "rows": 4, "prefetch": False, "stages": 3},
    "rows a warp each, fetched ahead": {"warps": 1, "rows": 4, "prefetch": True, "stages": 1},
    "two warps a row, fetched ahead": {"warps": 2, "rows": 1, "prefetch": True, "stages": 1},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_programs_walk_over_rows_and_end_within_a_tile(monkeypatch, options):
    plan = kernels.BackwardPlan(**options, programs=2, registers=None)
    monkeypatch.setattr(kernels, "backward_plan", lambda *_: plan)
    assert_forward_and_backward((11, 300), torch.float32)


def test_narrow_rows_are_added_up_within_a_tile(monkeypatch):
    monkeypatch.setattr(kernels, "NARROW_TILE", 64)
    plan = kernels.backward_plan(24, 2, True)._replace(programs=2)
    monkeypatch.setattr(kernels, "backward_plan", lambda *_: plan)
    assert kernels.tile_of(24, plan.rows, plan.warps) == kernels.Tile(rows=2, warps=4, C=32, K=1)
    assert_forward_and_backward((9, 24), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(monkeypatch, dtype):
    """Chunks one after another; several blocks of columns and parts of the rows, none of them whole."""
    monkeypatch.setattr(kernels, "IN_REGISTERS", 128)
    monkeypatch.setattr(long, "CHUNK", 128)
    monkeypatch.setattr(long, "COLUMNS", 256)
    monkeypatch.setattr(long, "COLUMN_ROWS", 2)
    monkeypatch.setattr(long, "MOST_PARTS", 2)
    assert_forward_and_backward((5, 300), dtype)


def test_a_row_of_65536():
    x, weight, bias = torch.randn(2, 65_536), torch.randn(65_536), torch.randn(65_536)
    y = fastbert.layer_norm(x, weight, bias, EPS)
    truth = fastbert.layer_norm(x.double(), weight.double(), bias.double(), EPS, backend="reference")
    assert_close(y, fastbert.layer_norm(x, weight, bias, EPS, backend="reference"), truth)


def test_tiles_of_models():
    """Widths of BERT and ALBERT: a warp a row up to 768 columns backward, eight columns a lane, no lane idle."""
    assert kernels.tile_of(768, 4, 1) == kernels.Tile(rows=4, warps=4, C=256, K=3)
    assert kernels.tile_of(1024, 1, 2) == kernels.Tile(rows=1, warps=2, C=512, K=2)
    assert kernels.tile_of(4096, 1, 4) == kernels.Tile(rows=1, warps=4, C=1024, K=4)
    assert kernels.tile_of(128, 4, 1) == kernels.Tile(rows=8, warps=4, C=128, K=1)
    assert kernels.tile_of(1, 4, 1) == kernels.Tile(rows=128, warps=4, C=8, K=1)
