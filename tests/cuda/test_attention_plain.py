"""Attention without tensor cores, in every dtype: on a GPU the package takes it for float32 and for odd heads alone."""

from functools import cache
from pathlib import Path

import emulated
import emulated_backend
import pybind11
import pytest
import torch
from emulated_backend import Module

import fastbert
from fastbert.ops import attention as op
from fastbert.testing import assert_close

SEED = torch.tensor([0x123456789ABCDEF])


class Plain(Module):
    """`fastbert._cuda`, emulated, but that its attention is the plain one."""

    def __init__(self, trace: bool) -> None:
        self.__dict__.update(vars(emulated_backend.module(trace)))  # one library, and one place for its faults
        bindings, check_faults = Path(__file__).with_name("attention_plain_bindings.cpp"), self.compiled.check_faults
        self.compiled = emulated.extension("attention_plain", bindings, self.library, [f"-I{pybind11.get_include()}"])
        self.compiled.check_faults = check_faults

    def attention_scratch(self, *sizes: int) -> int:
        return 0


plain = cache(Plain)


@pytest.fixture(params=[False, True], ids=["values", "trace"])
def module(request):
    with emulated_backend.chosen(request.param, make=plain) as module:
        yield module


def packed(lengths, heads, head_size, dtype):
    """q, k and v as views of one projection, cu_seqlens, and the gradient of out."""
    generator = torch.Generator().manual_seed(head_size)
    qkv = torch.randn(sum(lengths), 3, heads, head_size, generator=generator).mul(1.5).to(dtype)
    dout = torch.randn(sum(lengths), heads, head_size, generator=generator).to(dtype)
    return qkv.unbind(1), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), dout


def run(functions, qkv, dout, *options):
    out, lse = functions.attention_forward(*qkv, *options)
    return out, lse, functions.attention_backward(dout, *qkv, out, lse, *options)


# (lengths, heads, head size)
CASES = {
    "nothing": ([], 2, 8),
    "an odd head, tails and an empty sequence": ([5, 0, 1, 17], 3, 7),
    "tiles that are full": ([64], 2, 64),
    "two tiles, half of a warp's rows": ([72], 1, 32),
    "two slices of the head": ([20], 1, 96),
    "four slices, the last a tail": ([19], 1, 193),
}
OPTIONS = {
    "all": (0, None, False, None),
    "dropped": (26, SEED, False, None),
    "causal window, dropped": (26, SEED, True, [20, 5]),
}
# 16-bit types differ from float32 in how they are read and written alone.
WAYS = [(torch.float32, case, options) for case in CASES for options in OPTIONS] + [
    (dtype, case, "causal window, dropped")
    for dtype in (torch.bfloat16, torch.float16)
    for case in (
        "an odd head, tails and an empty sequence",
        "two tiles, half of a warp's rows",
        "two slices of the head",
    )
]


@pytest.mark.parametrize(("dtype", "case", "options"), WAYS, ids=str)
def test_close_to_truth(module, case, options, dtype):
    """The truth is the twin in float64; no more than twice what the twin in this dtype is off."""
    lengths, heads, head_size = CASES[case]
    assert_right(lengths, heads, head_size, dtype, *OPTIONS[options])


def assert_right(lengths, heads, head_size, dtype, *options):
    qkv, cu_seqlens, dout = packed(lengths, heads, head_size, dtype)
    shared = cu_seqlens, max(lengths, default=0), head_size**-0.5, *options
    ours = run(op.functions["cuda"], qkv, dout, *shared)
    baseline = run(op.functions["reference"], qkv, dout, *shared)
    truth = run(op.functions["reference"], [x.double() for x in qkv], dout.double(), *shared)
    for name, *each in zip(("out", "lse", "dqkv"), ours, baseline, truth, strict=True):
        assert each[0].dtype == each[1].dtype and each[0].shape == each[1].shape, name
        if each[0].numel():
            assert_close(*each, what=name)


def chosen(tokens, *places):
    """Which tokens are global."""
    return torch.zeros(tokens, dtype=torch.bool).index_fill(0, torch.tensor(places), True)


ORDER = torch.randperm(190, generator=torch.Generator().manual_seed(0)).int()
FALLING = -(torch.arange(320) // 64).int()  # a tile sees itself and those behind it

# (lengths, heads, head size, t, window, global tokens, query ranks, key ranks)
BY_TOKEN = {
    "global tokens, two slices, dropped": ([150, 0, 9], 1, 72, 26, [3, 20], chosen(159, 60, 149, 155), None, None),
    "ranks, dropped": ([150, 0, 40], 2, 8, 26, None, None, ORDER - 1, ORDER),
    "ranks, first tiles and a whole tile see nothing": (
        [192, 5], 1, 80, 0, None, None, FALLING[:197].index_fill(0, torch.arange(64, 128), -9), FALLING[:197],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_TOKEN)
def test_masks_by_token(module, case):
    lengths, heads, head_size, t, *masks = BY_TOKEN[case]
    assert_right(lengths, heads, head_size, torch.float32, t, SEED, False, *masks)


@pytest.mark.parametrize("module", [False], indirect=True, ids=["values"])
def test_a_global_token_is_found_more_than_32_tiles_away(module):
    assert_right([2150, 3], 1, 4, torch.float32, 0, None, False, [1, 1], chosen(2153, 2100, 2151), None, None)


@pytest.mark.parametrize("module", [True], indirect=True, ids=["trace"])
@pytest.mark.parametrize(
    ("masks", "seen"),
    [(([0, 0], chosen(320, 130), None, None), 13), ((None, None, FALLING, FALLING), 15)],
    ids=["global tokens", "ranks"],
)
def test_tiles_of_which_nothing_is_seen_are_not_read(module, masks, seen):
    """`seen` of 5 x 5 tiles: those of the diagonal, of a global token's row and column; those that a rank leaves."""
    module.sample = 1 << 20  # all blocks
    qkv, cu_seqlens, dout = packed([320], 1, 8, torch.float32)
    qkv, options, tile = [x.contiguous() for x in qkv], (cu_seqlens, 320, 0.3, 0, None, False, *masks), 64 * 8 * 4
    functions, library = op.functions["cuda"], module.library
    out, lse = functions.attention_forward(*qkv, *options)
    traffic = library.traffic()
    assert [traffic[name, "read"] for name in "qkv"] == [5 * tile, seen * tile, seen * tile]
    functions.attention_backward(dout, *qkv, out, lse, *options)
    traffic = library.traffic()  # dq's kernel as forward, and dk's and dv's, which reads q once more for dk
    assert [traffic[name, "read"] for name in "qkv"] == [(5 + n * seen) * tile for n in (2, 1, 1)]


@pytest.mark.parametrize("module", [True], indirect=True, ids=["trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_banks_and_sectors(module, dtype):
    """Two heads of BERT: no access to shared memory takes more than twice as long as it must, none of the products'
    takes longer at all, and inputs and results move in whole sectors."""
    module.sample = 1 << 20  # all blocks
    qkv, cu_seqlens, dout = packed([128], 2, 64, dtype)
    options = cu_seqlens, 128, 0.125, 26, SEED, False, None
    functions, library = op.functions["cuda"], module.library
    out, lse = functions.attention_forward(*qkv, *options)
    tables = library.accesses()
    functions.attention_backward(dout, *qkv, out, lse, *options)
    tables += library.accesses()
    shared = [a for a in tables if a.shared]
    assert all(a.conflicts <= 2 for a in shared), library.table()
    assert all(a.conflicts == 1 for a in shared if a.access == "read"), library.table()
    moved = [a for a in tables if not a.shared and a.memory not in ("lse", "cu_seqlens", "seed")]
    assert {a.memory for a in moved} == {"q", "k", "v", "out", "dout", "dqkv"}
    assert all(a.cost == a.ideal for a in moved), library.table()


@pytest.mark.parametrize(
    ("bounds", "place"),
    [([0, 9, 5], 1), ([0, 5, 13], 1), ([0, 12], 0), ([0, 5, 11], 1), ([1, 5, 12], 0)],
    ids=["decrease", "pass T", "too long", "not to the end", "not from the start"],
)
def test_sequences_that_cannot_be_are_reported_by_the_next_call(module, bounds, place):
    """And nothing is touched for them."""
    qkv, _, _ = packed([12], 2, 8, torch.float32)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    op.functions["cuda"].attention_forward(*qkv, cu_seqlens, 9, 0.3, 0, None, False, None)
    with pytest.raises(ValueError, match=rf"attention was given cu_seqlens .* at sequence {place}:"):
        fastbert.check_device_errors()
