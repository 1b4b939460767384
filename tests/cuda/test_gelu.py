"""GELU's kernels for GPUs: paths that the other backends do not have, and what they move."""

import emulated_backend
import pytest
import torch
from op_cases import assert_solves, problem
from torch.nn import functional as F

import fastbert
from fastbert.ops.gelu import functions

ROWS, COLUMNS = 256, 256  # 16-bit types: the columns of one warp


@pytest.mark.parametrize(
    "dtype, bias_dtype",
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
def test_several_parts_and_blocks_of_columns(module, dtype, bias_dtype):
    """150 rows are three parts; 264 columns are a block in float16, and an access of the next."""
    x, dy, bias = torch.randn(150, 264).to(dtype), torch.randn(150, 264).to(dtype), torch.randn(264).to(bias_dtype)
    theirs = problem((x, bias), dy, fastbert.gelu, lambda x, bias: F.gelu(x + bias.to(x.dtype)))
    assert_solves(fastbert.gelu, theirs, ("y", "dx", "dbias"))


@pytest.mark.parametrize("rows", [10, 150])
def test_an_address_between_accesses_gives_the_same_bits(module, rows):
    """Then elements are read one by one, in the same order of sums."""
    x, dy, bias = (torch.randn(rows * 24 + 1).half() for _ in range(3))
    bias, (x, dy) = bias[:24], (each[1:].view(rows, 24) for each in (x, dy))
    expected = functions["cuda"].gelu_backward(dy.clone(), x.clone(), bias, "none")
    for given in ((dy, x.clone()), (dy.clone(), x)):
        assert all(map(torch.equal, functions["cuda"].gelu_backward(*given, bias, "none"), expected))
    assert torch.equal(fastbert.gelu(x, bias), fastbert.gelu(x.clone(), bias))
    assert torch.equal(fastbert.gelu(x), fastbert.gelu(x.clone()))


def test_more_blocks_of_columns_than_a_set_has_counters(module):
    """67 of them: their counters are in scratch, and zeroed by a kernel."""
    x, dy, bias = torch.randn(65, 2113), torch.randn(65, 2113), torch.randn(2113)
    theirs = problem((x, bias), dy, fastbert.gelu, lambda x, bias: F.gelu(x + bias))
    assert_solves(fastbert.gelu, theirs, ("y", "dx", "dbias"))


@pytest.mark.parametrize("columns, kernels", [(768, 1), (2113, 2)])
def test_one_kernel_gives_both_gradients(columns, kernels, monkeypatch):
    monkeypatch.setattr(emulated_backend, "EVERY_ORDER", 0)
    emulated = emulated_backend.module(trace=False)
    x, dy, bias = torch.randn(65, columns), torch.randn(65, columns), torch.randn(columns)
    with emulated_backend.installed(emulated), emulated.library.listing() as launches:
        functions["cuda"].gelu_backward(dy, x, bias, "none")
    assert [kernel for kernel, _ in launches] == ["gelu_backward"] * kernels


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
