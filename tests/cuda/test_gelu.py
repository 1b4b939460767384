"""What GELU's kernels move, by the trace of the emulator."""

import emulated
import emulated_backend
import pytest
import torch

import fastbert

ROWS, COLUMNS = 256, 256  # 16-bit types: the columns of one warp


@pytest.fixture
def traced():
    if reason := emulated.why_not():
        pytest.skip(reason)
    module = emulated_backend.module(trace=True)
    module.sample = 1 << 20  # all blocks
    with emulated_backend.installed(module), fastbert.use_backend("cuda"):
        yield module
    module.sample = 4


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_moves_once_in_whole_sectors(traced, dtype, approximate):
    """x, y, dy and dx are read and written once and no sector for nothing; each warp reads its bias once."""
    x, dy = torch.randn(2, ROWS, COLUMNS).to(dtype)
    bias = torch.randn(COLUMNS, requires_grad=True)
    each = x.numel() * x.element_size()

    y = fastbert.gelu(x.requires_grad_(), bias, approximate)
    forward = traced.library.accesses(), traced.library.traffic()
    y.backward(dy)
    backward = traced.library.accesses(), traced.library.traffic()
    plain = (
        {("x", "read"): each, ("y", "write"): each},
        {name: each for name in [("dy", "read"), ("x", "read"), ("dx", "write")]},
    )
    for (accesses, traffic), floor in zip((forward, backward), plain, strict=True):
        assert {name: traffic[name] for name in floor} == floor
        costs, ideals = (sum(getattr(a, what) for a in accesses if not a.shared) for what in ("cost", "ideal"))
        assert ideals / costs >= 0.9, traced.library.table()
        assert all(a.bytes == 16 for a in accesses if a.memory in ("x", "dx", "dy", "y")), traced.library.table()


@pytest.mark.parametrize("rows", [5120, 16384])
def test_parts_of_dbias_are_little_beside_the_rest(traced, rows):
    """Written and read once each: at BERT base's sizes in bfloat16 within 2 % of dy, x and dx."""
    assert 2 * 4 * traced.gelu_scratch(rows, 3072) <= 0.02 * 3 * 2 * rows * 3072
