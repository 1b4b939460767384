"""Attention on tensor cores: what tests/ops/test_attention.py, whose small cases it also runs, does not reach."""

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import attention as op
from fastbert.ops import philox
from fastbert.testing import assert_close

SEED = torch.tensor([0x123456789ABCDEF])
WHOLE = 128  # tokens that backward takes in one kernel


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def packed(lengths, heads, head_size, dtype):
    """q, k and v as views of one projection, cu_seqlens, and the gradient of out."""
    generator = torch.Generator().manual_seed(head_size)
    qkv = torch.randn(sum(lengths), 3, heads, head_size, generator=generator).mul(1.5).to(dtype)
    dout = torch.randn(sum(lengths), heads, head_size, generator=generator).to(dtype)
    return qkv.unbind(1), boundaries(lengths), dout


def run(functions, qkv, dout, *options):
    out, lse = functions.attention_forward(*qkv, *options)
    return out, lse, functions.attention_backward(dout, *qkv, out, lse, *options)


def assert_right(qkv, dout, *options):
    """Results and gradients are the truth's in float64, the twin in the same dtype being the baseline."""
    wide = [x.double() for x in (*qkv, dout)]
    truth = run(op.reference, wide[:3], wide[3], *options)
    baseline = run(op.reference, qkv, dout, *options)
    ours = run(op.functions["cuda"], qkv, dout, *options)
    for name, *each in zip(("out", "lse", "dqkv"), ours, baseline, truth, strict=True):
        assert_close(*each, what=name)


# (lengths, max_seqlen, heads, head size, scale, window, t)
CASES = {
    "whole, heads of 64": ([70, 0, 128, 1], 128, 1, 64, 0.125, None, 26),
    "whole, heads of 32 within 32": ([40, 20], 40, 2, 24, 0.2, None, 26),
    "whole, heads of 96 within 128": ([50, 17], 50, 1, 96, 0.1, [5, 3], 26),
    "tiles, heads of 64": ([150, 40], 150, 1, 64, 0.125, None, 26),
    "tiles, heads of 32": ([130, 3], 130, 1, 32, 0.2, None, 0),
    "tiles, heads of 128": ([140, 20], 140, 1, 128, 0.1, None, 26),
    "32 queries a warp, far behind a window": ([330], 330, 1, 64, 0.125, [20, 0], 26),
    "a longest that is not there": ([60, 9], 1000, 1, 64, 0.125, None, 26),
    "a negative scale": ([60, 9], 60, 1, 64, -0.2, None, 26),
    "a negative scale in tiles": ([131], 131, 1, 64, -0.2, None, 0),
    "no scale at all": ([30], 30, 1, 64, 0.0, [4, 4], 0),
    "everything dropped": ([30, 131], 131, 1, 64, 0.125, None, 256),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(module, nan_filled, case, dtype):
    lengths, longest, heads, head_size, scale, window, t = CASES[case]
    qkv, cu_seqlens, dout = packed(lengths, heads, head_size, dtype)
    options = cu_seqlens, longest, scale, t, SEED, False, window
    assert_right(qkv, dout, *options)


@pytest.mark.parametrize("longest", [WHOLE, WHOLE + 1], ids=["whole", "tiles"])
def test_mask_is_the_contracts(values, longest):
    """Of forward in out, of each half of backward in dq and in dv, bit by bit.

    With equal scores and one-hot values `out` is the weights themselves, with one-hot dout dv is, transposed. With
    one-hot keys dq is dS, above 0 where the weight is kept and below where it is dropped.
    """
    lengths, heads, size = [100, 29, 1], 2, 128
    tokens, cu_seqlens = sum(lengths), boundaries(lengths)
    place = torch.cat([torch.arange(n) for n in lengths])
    length = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    exists = torch.arange(size) < length[:, None, None]
    t = philox.threshold(0.3, bits=8)
    query, head = torch.arange(tokens).view(-1, 1, 1), torch.arange(heads).view(1, -1, 1)
    lanes = philox.lanes(size, query, head, 1, SEED, bits=8)
    kept = (lanes >= t) & exists  # [T, N, key]

    nothing = torch.zeros(tokens, heads, size, dtype=torch.bfloat16)
    one_hot = F.one_hot(place, size).bfloat16().unsqueeze(1).expand(tokens, heads, size).contiguous()
    same = F.one_hot(torch.zeros_like(place), size).bfloat16().unsqueeze(1).expand_as(one_hot).contiguous()
    options = cu_seqlens, longest, 1.0, t, SEED, False, None
    out, _, dqkv = run(op.functions["cuda"], (nothing, nothing, one_hot), one_hot, *options)
    assert torch.equal(out != 0, kept)
    by_query = torch.zeros(tokens, heads, size, dtype=torch.bool)
    for start, n in zip(cu_seqlens.tolist(), lengths, strict=False):
        by_query[start : start + n, :, :n] = (dqkv[start : start + n, 2, :, :n] != 0).transpose(0, 2)
    assert torch.equal(by_query, kept)

    _, _, dqkv = run(op.functions["cuda"], (nothing, one_hot, same), same, *options)
    mixed = kept.any(-1, keepdim=True) & (kept != exists).any(-1, keepdim=True)
    assert torch.equal((dqkv[:, 0] > 0) & mixed, kept & mixed) and mixed.sum() > 200


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("longest", [WHOLE, WHOLE + 64], ids=["whole", "tiles"])
def test_whole_sectors_and_no_bank_conflicts(traced, longest, head_size):
    qkv, cu_seqlens, dout = packed([longest], 128 // head_size, head_size, torch.bfloat16)
    options = cu_seqlens, longest, 0.125, 26, SEED, False, None
    out, lse = op.functions["cuda"].attention_forward(*qkv, *options)
    accesses = traced.library.accesses()
    op.functions["cuda"].attention_backward(dout, *qkv, out, lse, *options)
    traffic = traced.library.traffic()
    accesses += traced.library.accesses()
    for kernel in {a.kernel for a in accesses}:
        cost, ideal = (
            sum(getattr(a, what) for a in accesses if a.kernel == kernel and not a.shared) for what in ("cost", "ideal")
        )
        assert ideal / cost >= 0.9, kernel
    shared = [a for a in accesses if a.shared]
    assert all(a.conflicts <= 2 for a in shared), traced.library.table()
    # Fragments, and the tiles that they come from, are read and written without any.
    assert all(a.conflicts == 1 for a in shared if a.bytes == 16)
    tensors = {"q", "k", "v", "dout", "out", "dqkv"}
    assert all(a.bytes == 16 for a in accesses if a.memory in tensors)
    if longest == WHOLE:
        each = out.numel() * 2
        assert [traffic[name, "read"] for name in ("dout", "out")] == [each, each]
        assert sum(traffic[name, "read"] for name in "qkv") == traffic["dqkv", "write"] == 3 * each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["without tensor cores", "on tensor cores"])
def test_a_bound_far_past_the_tokens_changes_nothing(values, dtype):
    qkv, cu_seqlens, dout = packed([5, 1, 12], 2, 24, dtype)
    near, far = (
        run(op.functions["cuda"], qkv, dout, cu_seqlens, longest, 0.2, 26, SEED, False, [3, 4])
        for longest in (12, 2**31 - 1)
    )
    assert all(map(torch.equal, near, far))


def test_many_sequences(values):
    """More than an axis of the grid takes, 1,024; of each 128 the longest come first, and all of them come."""
    lengths = [1] * 127 + [3, 0, 2] + [1] * 900 + [5]
    qkv, cu_seqlens, dout = packed(lengths, 1, 8, torch.bfloat16)
    options = cu_seqlens, 5, 0.125, 26, SEED, True, None
    assert_right(qkv, dout, *options)


@pytest.mark.parametrize(
    ("bounds", "longest"),
    [([0, 20, 12], 20), ([0, 5, 21], 20), ([0, 3, 20], 16), ([0, 5, 19], 20), ([1, 5, 20], 2**31 - 1)],
    ids=["decreasing", "beyond", "too long", "not to the end", "not from the start"],
)
def test_boundaries_that_do_not_hold_are_reported(module, bounds, longest):
    """By the next call; nothing is read or written outside."""
    qkv = packed([20], 1, 64, torch.bfloat16)[0]
    options = torch.tensor(bounds, dtype=torch.int32), longest, 0.125, 0, None, False, None
    with module.running():
        op.kernels.attention_forward(*qkv, *options)
        with pytest.raises(ValueError, match="attention was given cu_seqlens that decrease"):
            module.compiled.check_faults()


@pytest.mark.parametrize(("sequences", "longest"), [(0, 5), (2, 0)])
def test_sequences_that_cannot_hold_the_tokens_are_refused_without_a_look(sequences, longest):
    bounds = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=f"make up the 3 tokens, got {sequences} sequences of at most {longest}"):
        op.kernels.check_sequences(bounds, longest, 3)
    op.kernels.check_sequences(bounds, longest, 0)
