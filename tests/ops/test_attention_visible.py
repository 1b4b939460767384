"""Masks that go by the token, global tokens and ranks; the others are in test_attention.py."""

import functools

import pytest
import torch
from attention_truth import SEED, pack, torch_attention
from op_cases import assert_same_for_threads, assert_solves, drawn, problem

import fastbert
from fastbert.testing import run


def lengths_for(backend, dtype, lengths):
    """Of which the first, 530, makes two blocks of keys on the CPU; three blocks where Triton is interpreted."""
    if backend != "triton" or torch.cuda.is_available():
        return lengths
    if dtype != torch.bfloat16:
        pytest.skip("left to a real GPU")
    return 150, *lengths[1:]


# (window, the tokens that are global, of a batch of 540)
GLOBALS = {
    "the first of a sequence, one in the middle": ((3, 2), [0, 300, 525, 530, 535]),
    "neighbours, and the last": ((0, 0), [250, 251, 252, 539]),
    "none": ((40, 1), []),
    "all": ((1, 1), range(540)),
    "a window that sees all": ((-1, -1), [5]),
}


@functools.cache
def judged_globals(name, dtype, lengths):
    """Without dropout, and with it."""
    window, places = GLOBALS[name]
    generator, tokens = drawn("global tokens", name, dtype), sum(lengths)
    qkv, cu_seqlens = pack(lengths, 1, 12, dtype, generator)
    dout = torch.randn(tokens, 1, 12, generator=generator).to(dtype)
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[[place * tokens // 540 for place in places]] = True
    options = {"window": window, "global_tokens": chosen}

    def ours(x, p):
        return fastbert.attention(*x.unbind(1), cu_seqlens, max(lengths), dropout_p=p, seed=SEED, **options)

    def by_torch(x):
        return torch_attention(*x.unbind(1), lengths, **options)

    return [(p, lambda x, p=p: ours(x, p), problem((qkv,), dout, lambda x, p=p: ours(x, p), theirs))
            for p, theirs in ((0.0, by_torch), (0.1, None))]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GLOBALS)
def test_global_tokens(backend, nan_filled, name, dtype):
    """They see all of their sequence and are seen by all of it, whatever block of keys or queries they stand in."""
    for p, function, given in judged_globals(name, dtype, lengths_for(backend, dtype, (530, 0, 9, 1))):
        assert_solves(function, given, (f"out p={p}", f"dqkv p={p}"))


def test_truth_of_global_tokens_is_torchs():
    window, places = (3, 2), [0, 11, 17]
    qkv, cu_seqlens = pack([5, 1, 12], 2, 8, torch.float64)
    chosen = torch.zeros(18, dtype=torch.bool)
    chosen[places] = True
    ours = fastbert.attention(*qkv.unbind(1), cu_seqlens, 12, window=window, global_tokens=chosen)
    torch.testing.assert_close(ours, torch_attention(*qkv.unbind(1), [5, 1, 12], window=window, global_tokens=chosen))


# (query ranks, key ranks) of one sequence
RANKS = {
    "xlnet's content stream": lambda order: (order, order),
    "xlnet's query stream: the first sees nothing": lambda order: (order - 1, order),
    "whole blocks unseen and seen": lambda order: (torch.arange(len(order)) // 100, torch.arange(len(order)) // 100),
    "the least and the greatest": lambda order: (
        torch.where(order % 2 == 0, 2**31 - 1, -(2**31)),
        torch.where(order % 3 == 0, 2**31 - 1, -(2**31)),
    ),
    "nothing is seen": lambda order: (order * 0 - 1, order * 0),
}


def ranks_of(name, lengths, generator=None):
    """(query_ranks, key_ranks) of the batch, by a permutation of each sequence."""
    each = [RANKS[name](torch.randperm(length, generator=generator)) for length in lengths]
    return tuple(torch.cat(ranks).int() for ranks in zip(*each, strict=True))


@functools.cache
def judged_ranks(name, dtype, lengths):
    """Without dropout, and with it."""
    generator, tokens = drawn("ranks", name, dtype), sum(lengths)
    qkv, cu_seqlens = pack(lengths, 2, 12, dtype, generator)
    dout = torch.randn(tokens, 2, 12, generator=generator).to(dtype)
    ranks = ranks_of(name, lengths, generator)

    def ours(x, p):
        return fastbert.attention_qkv(x, cu_seqlens, max(lengths), dropout_p=p, seed=SEED, ranks=ranks)

    def by_torch(x):
        return torch_attention(*x.unbind(1), lengths, ranks=ranks)

    return [(p, lambda x, p=p: ours(x, p), problem((qkv,), dout, lambda x, p=p: ours(x, p), theirs))
            for p, theirs in ((0.0, by_torch), (0.1, None))]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RANKS)
def test_ranks(backend, nan_filled, name, dtype):
    for p, function, given in judged_ranks(name, dtype, lengths_for(backend, dtype, (530, 0, 70, 1))):
        assert_solves(function, given, (f"out p={p}", f"dqkv p={p}"))


@pytest.mark.parametrize("name", RANKS)
def test_truth_of_ranks_is_torchs(name):
    qkv, cu_seqlens = pack([5, 1, 12], 2, 8, torch.float64)
    ranks = ranks_of(name, [5, 1, 12])
    ours = fastbert.attention(*qkv.unbind(1), cu_seqlens, 12, ranks=ranks)
    torch.testing.assert_close(ours, torch_attention(*qkv.unbind(1), [5, 1, 12], ranks=ranks))


def test_ranks_by_hand(backend):
    """Equal scores; tokens are read in the order 2, 0, 1, and then in none."""
    q, v = torch.zeros(5, 1, 1), torch.tensor([3.0, 6.0, 9.0, 5.0, 7.0]).view(5, 1, 1)
    cu_seqlens, order = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([1, 2, 0, 0, 0], dtype=torch.int32)
    content = fastbert.attention(q, q, v, cu_seqlens, 3, ranks=(order, order))
    torch.testing.assert_close(content.flatten(), torch.tensor([6.0, 6.0, 9.0, 6.0, 6.0]))
    query = fastbert.attention(q, q, v, cu_seqlens, 3, ranks=(order - 1, order))
    torch.testing.assert_close(query.flatten(), torch.tensor([9.0, 6.0, 0.0, 0.0, 0.0]))


def test_ranks_that_are_places_are_causal(backend):
    """And the mask of dropout stays that of the contract."""
    qkv, cu_seqlens = pack([90, 40], 2, 16, torch.float32)
    dout, places = torch.randn(130, 2, 16), torch.cat([torch.arange(90), torch.arange(40)]).int()
    options = {"dropout_p": 0.2, "seed": SEED}
    ranked = run(lambda x: fastbert.attention_qkv(x, cu_seqlens, 90, ranks=(places, places), **options), (qkv,), dout)
    causal = run(lambda x: fastbert.attention_qkv(x, cu_seqlens, 90, causal=True, **options), (qkv,), dout)
    for ours, expected in zip(ranked, causal, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_global_tokens_by_hand(backend):
    """Each sees itself alone, with equal scores: but for the global one of three, which sees all and all see it."""
    q, v = torch.zeros(4, 1, 1), torch.tensor([3.0, 6.0, 9.0, 5.0]).view(4, 1, 1)
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    chosen = torch.tensor([False, False, True, False])
    out = fastbert.attention(q, q, v, cu_seqlens, 3, window=(0, 0), global_tokens=chosen)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 7.5, 6.0, 5.0]))


@pytest.mark.parametrize("mask", ["global tokens", "ranks"])
def test_masks_by_token_with_any_threads(kernels, mask):
    """Their blocks are summed in one order, however the queries and keys are cut into tasks."""
    qkv, cu_seqlens = pack([600, 2200], 1, 16, torch.bfloat16)
    chosen = torch.zeros(2800, dtype=torch.bool)
    chosen[[0, 77, 600, 1900, 2799]] = True
    masks = {
        "global tokens": {"window": (9, 30), "global_tokens": chosen},
        "ranks": {"ranks": ranks_of("whole blocks unseen and seen", [600, 2200])},
    }
    dout, options = torch.randn(2800, 1, 16), {"dropout_p": 0.1, "seed": SEED, **masks[mask]}
    function = lambda x: fastbert.attention_qkv(x, cu_seqlens, 2200, **options)  # noqa: E731
    assert_same_for_threads(lambda: run(function, (qkv,), dout), (1, 16))
