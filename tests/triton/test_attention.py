"""What attention's Triton kernels do in ways of their own; tests/ops/test_attention.py runs on them too."""

import pytest
import torch
import torch.nn.functional as F
from attention_truth import SEED
from op_cases import assert_solves, problem

pytest.importorskip("triton")
import triton.language as tl

import fastbert
from fastbert.kernels.attention import LARGE_75, Plan, _Call, attention_backward, plan, target_of
from fastbert.ops import philox
from fastbert.testing import run


def packed(lengths):
    """cu_seqlens and each token's place in its sequence."""
    ends = torch.tensor(lengths).cumsum(0)
    return F.pad(ends, (1, 0)).int(), torch.cat([torch.arange(n) for n in lengths])


@pytest.mark.parametrize(("lengths", "head_size"), [([64, 40], 64), ([70], 128)], ids=["one kernel", "two kernels"])
def test_every_kernel_draws_the_contracts_mask(triton, lengths, head_size):
    """With scores of 0 and one-hot rows the mask can be read off out, dq and dv."""
    cu_seqlens, place = packed(lengths)
    tokens, heads = sum(lengths), 2
    one_hot = F.one_hot(place, head_size).bfloat16().unsqueeze(1).expand(-1, heads, -1).contiguous()
    q = torch.zeros_like(one_hot)
    ones = torch.ones_like(one_hot)

    def attention(q, k, v):
        return fastbert.attention(q, k, v, cu_seqlens, max(lengths), dropout_p=0.3, seed=SEED)

    query, head = torch.arange(tokens).view(-1, 1, 1), torch.arange(heads).view(1, -1, 1)
    keep = philox.lanes(head_size, query, head, 1, SEED, bits=8) >= philox.threshold(0.3, bits=8)
    keep &= torch.arange(head_size) < torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).view(-1, 1, 1)
    out, dq, _, _ = run(attention, (q, one_hot, one_hot), ones)  # each dout . v is 1: dS > 0 where a weight is kept
    assert torch.equal(out != 0, keep) and torch.equal(dq > 0, keep)
    *_, dv = run(attention, (q, one_hot, one_hot), one_hot)  # [key, query]
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        kept, length = keep[begin:end].permute(2, 1, 0), end - begin
        assert torch.equal(dv[begin:end, :, :length] != 0, kept[:length])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_below_0(triton, scale):
    cu_seqlens, _ = packed([20, 45])
    qkv, dout = torch.randn(65, 3, 1, 32).bfloat16(), torch.randn(65, 1, 32).bfloat16()

    def attention(qkv):
        return fastbert.attention_qkv(qkv, cu_seqlens, 45, scale=scale)

    assert_solves(attention, problem((qkv,), dout, attention), ("out", "dqkv"))


def test_keys_behind_the_end_of_a_short_sequence_do_not_count(triton):
    """Scores of -400: exp of a score of 0, which keys that are not there have, less lse is infinite."""
    cu_seqlens, _ = packed([5, 3])
    q = torch.full((8, 1, 16), 5.0).bfloat16()
    k, v, dout = -q, torch.randn(8, 1, 16).bfloat16(), torch.randn(8, 1, 16).bfloat16()

    def attention(q, k, v):
        return fastbert.attention(q, k, v, cu_seqlens, 5, scale=1.0)

    assert_solves(attention, problem((q, k, v), dout, attention), ("out", "dq", "dk", "dv"))


# Boundaries of 6 tokens and the sequence at fault: one decreases, two pass the tokens, one is longer than max_seqlen.
WRONG = [([0, 4, 2, 6], 1), ([0, 3, 7], 1), ([-1, 3, 6], 0), ([0, 5, 6], 0)]
LEFT_OUT = [([1, 3, 6], 0), ([0, 3, 5], 1)]  # the first token, and the last


@pytest.mark.parametrize(("bounds", "place"), [*WRONG, *LEFT_OUT], ids=str)
def test_sequences_that_do_not_hold_are_reported(triton, bounds, place):
    with pytest.raises(ValueError, match=rf"attention was given cu_seqlens .* at sequence {place}:"):
        fastbert.attention_qkv(torch.randn(6, 3, 1, 16), torch.tensor(bounds, dtype=torch.int32), 4)
        fastbert.check_device_errors()


@pytest.mark.parametrize("whole", [True, False], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize(("bounds", "place"), WRONG[1:3], ids=str)
def test_backward_touches_nothing_by_sequences_that_do_not_hold(interpreted, monkeypatch, bounds, place, whole):
    """A GPU runs it before anybody has read what forward reported; the interpreter refuses addresses outside."""
    tile = Plan(16, 16, 4, 1)
    monkeypatch.setattr(_Call, "plan", lambda call, kernel: tile if whole or kernel != "whole" else None)
    q, k, v, out = torch.randn(4, 6, 1, 16)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"attention was given cu_seqlens .* at sequence {place}:"):
        attention_backward(out, q, k, v, out, torch.zeros(6, 1), bounds, 4, 0.25, 0, None, False, None)


@pytest.mark.parametrize(("sequences", "longest"), [(0, 5), (2, 0), (2, -1)])
def test_sequences_that_cannot_hold_the_tokens_are_refused_without_a_look(triton, sequences, longest):
    """Their grid is empty: no program could report them, and the result would be memory that nobody wrote."""
    bounds = torch.zeros(sequences + 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"make up the 3 tokens, got {sequences} sequences of at most {longest}"):
        fastbert.attention_qkv(torch.randn(3, 3, 1, 16), bounds, longest)
    assert fastbert.attention_qkv(torch.randn(0, 3, 1, 16), bounds, max(longest, 0)).shape == (0, 1, 16)


def test_heads_above_64_have_smaller_tiles_where_shared_memory_is_small(monkeypatch):
    """Compiled for sm_75, the others' tiles ask for up to 96 KB of its 64."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert target_of.__wrapped__(torch.device("cuda", 0)) == "sm_75"
    for D in (128, 256):
        for dtype in (torch.float32, torch.float16):
            assert {plan(kernel, D, dtype, "sm_75") for kernel in ("forward", "dq", "dk_dv")} == {LARGE_75}
            assert plan("whole", D, dtype, "sm_75") is None
    assert plan("dk_dv", 64, torch.float16, "sm_75") == plan("dk_dv", 64, torch.float16, "sm_80") == Plan(32, 64, 4, 2)


@pytest.fixture
def small_tiles(interpreted, monkeypatch):
    """Tiles of 16 rows, and ranks are looked at in sixteens."""
    tile = Plan(16, 16, 4, 1)
    monkeypatch.setattr(_Call, "plan", lambda call, kernel: None if kernel == "whole" else tile)
    monkeypatch.setattr("fastbert.kernels.attention_ranks.SCAN", tl.constexpr(16))


def assert_right_by(mask, lengths, dtype):
    """Of a mask that goes by the token, with dropout."""
    cu_seqlens, place = packed(lengths)
    qkv, dout = torch.randn(len(place), 3, 1, 16).to(dtype), torch.randn(len(place), 1, 16).to(dtype)
    order = (place * 7 % 11).int()
    chosen = torch.zeros(len(place), dtype=torch.bool)
    chosen[[37, 38]] = True
    masks = {"global tokens": {"window": (5, 9), "global_tokens": chosen}, "ranks": {"ranks": (order - 1, order)}}
    options = {"dropout_p": 0.2, "seed": SEED, **masks[mask]}

    def attention(x):
        return fastbert.attention_qkv(x, cu_seqlens, max(lengths), **options)

    assert_solves(attention, problem((qkv,), dout, attention), ("out", "dqkv"))


@pytest.mark.parametrize("mask", ["global tokens", "ranks"])
def test_masks_by_token_where_there_are_many_blocks(small_tiles, mask):
    """Before the window, in it and behind it."""
    assert_right_by(mask, [80, 7], torch.float32)


@pytest.mark.parametrize("mask", ["global tokens", "ranks"])
def test_masks_by_token_where_all_fits_into_a_tile(interpreted, mask):
    """Without them one kernel would give all gradients, and each query see all keys."""
    assert_right_by(mask, [60, 3], torch.bfloat16)


def test_blocks_that_nobody_sees_are_not_read(small_tiles):
    """A NaN would show, though its weight were 0."""
    (cu_seqlens, place), block = packed([64]), torch.arange(64).int() // 16
    qkv, dout = torch.randn(64, 3, 1, 16), torch.randn(64, 1, 16)
    dout[:16] = torch.nan  # the first queries see the first keys alone
    qkv[48:, 2] = torch.nan  # the last keys are seen by none
    ranks = block, torch.where(place < 48, block, 9).int()
    out, dqkv = run(lambda x: fastbert.attention_qkv(x, cu_seqlens, 64, ranks=ranks), (qkv,), dout)
    assert out.isfinite().all() and dqkv[16:].isfinite().all() and not dqkv[48:, 1:].any()

    qkv = torch.randn(64, 3, 1, 16)
    qkv[32:48, 2] = torch.nan  # neither global nor in the window of the queries before
    out = fastbert.attention_qkv(qkv, cu_seqlens, 64, window=(3, 0), global_tokens=place == 50)
    assert out[:32].isfinite().all() and out[32:].isnan().all()


def test_a_window_that_sees_all_leaves_global_tokens_out(interpreted, monkeypatch):
    monkeypatch.setattr("fastbert.kernels.attention.ranks_of_globals", None)
    qkv, (cu_seqlens, _) = torch.randn(9, 3, 1, 16), packed([9])
    given = fastbert.attention_qkv(qkv, cu_seqlens, 9, window=(-1, 8), global_tokens=torch.arange(9) == 2)
    assert torch.equal(given, fastbert.attention_qkv(qkv, cu_seqlens, 9))
