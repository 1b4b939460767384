import functools
import math
import sys

import pytest
import torch
from attention_truth import SEED, pack, torch_attention
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

import fastbert
from fastbert.ops import philox
from fastbert.testing import run

# (lengths, heads, head size)
CASES = {
    "nothing": ([], 2, 8),
    "empty sequences alone": ([0, 0], 2, 8),
    "one token": ([1], 1, 1),
    "tails of tokens and of the head": ([5, 0, 1, 17], 3, 7),
    "bert: a block of queries and more": ([64, 49, 31], 2, 64),
    "a backward block of keys and more": ([129, 65], 1, 40),
    "a wide head": ([40, 12], 1, 128),
    "the widest head": ([19], 1, 256),
    "two forward blocks of keys, a long run of queries": ([700], 1, 32),
}
MASKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal window": {"window": (20, 5), "causal": True},
    "no limit to the left": {"window": (-1, 2)},
}


@functools.cache
def judged(case, dtype, mask):
    """(p, problem) without and with dropout, which torch does not have with our mask."""
    lengths, heads, head_dim = CASES[case]
    generator = drawn("attention", case, dtype, mask)
    qkv, cu_seqlens = pack(lengths, heads, head_dim, dtype, generator)
    dout = torch.randn(sum(lengths), heads, head_dim, generator=generator).to(dtype)

    def ours(x, p):
        longest = max(lengths, default=0)
        return fastbert.attention(*x.unbind(1), cu_seqlens, longest, dropout_p=p, seed=SEED, **MASKS[mask])

    by_torch = (lambda x: torch_attention(*x.unbind(1), lengths, **MASKS[mask])) if lengths else None
    return [(p, lambda x, p=p: ours(x, p), problem((qkv,), dout, lambda x, p=p: ours(x, p), theirs))
            for p, theirs in ((0.0, by_torch), (0.1, None))]  # fmt: skip


# float16 differs from float32 in how it is read and written alone.
WAYS = [(d, m) for d in DTYPES for m in MASKS if d != torch.float16 or m in ("all", "causal window")]
# What Triton's interpreter has time for: each way through its kernels once.
INTERPRETED = {
    ("nothing", torch.bfloat16, "all"),
    ("empty sequences alone", torch.bfloat16, "all"),
    ("one token", torch.bfloat16, "all"),
    ("tails of tokens and of the head", torch.float32, "all"),
    ("tails of tokens and of the head", torch.float16, "causal window"),
    ("tails of tokens and of the head", torch.bfloat16, "no limit to the left"),
    ("bert: a block of queries and more", torch.bfloat16, "all"),
    ("bert: a block of queries and more", torch.bfloat16, "window"),
    ("a backward block of keys and more", torch.bfloat16, "all"),
    ("a backward block of keys and more", torch.bfloat16, "causal window"),
    ("a wide head", torch.bfloat16, "causal"),
    ("a wide head", torch.float32, "window"),
    ("the widest head", torch.bfloat16, "all"),
    ("two forward blocks of keys, a long run of queries", torch.bfloat16, "window"),
}


@pytest.mark.parametrize(("dtype", "mask"), WAYS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, nan_filled, case, dtype, mask):
    if backend == "triton" and not torch.cuda.is_available() and (case, dtype, mask) not in INTERPRETED:
        pytest.skip("left to a real GPU")
    masked = backend == "triton" and not torch.cuda.is_available() and mask != "all"  # interpreted, with dropout alone
    for p, function, given in judged(case, dtype, mask)[1 if masked else 0 :]:
        assert_solves(function, given, (f"out p={p}", f"dqkv p={p}"))


@pytest.mark.parametrize("mask", MASKS)
def test_truth_is_torchs(mask):
    lengths = [5, 1, 12]
    qkv, cu_seqlens = pack(lengths, 2, 8, torch.float64)
    ours = fastbert.attention(*qkv.unbind(1), cu_seqlens, 12, **MASKS[mask])
    torch.testing.assert_close(ours, torch_attention(*qkv.unbind(1), lengths, **MASKS[mask]))


def test_by_hand(backend):
    # Scores 0 and ln 3: weights 1/4 and 3/4.
    q = torch.ones(2, 1, 1)
    k = torch.tensor([0.0, math.log(3.0)]).view(2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(2, 1, 1)
    out = fastbert.attention(q, k, v, torch.tensor([0, 2], dtype=torch.int32), 2)
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 7.0]))


def test_reference_gradients():
    qkv, cu_seqlens = pack([3, 0, 2], 2, 2, torch.float64)
    chosen = torch.tensor([False, True, False, False, True])
    ranks = torch.tensor([[0, 1, -1, 2, 0], [1, 0, 2, 0, 1]], dtype=torch.int32).unbind()
    local = {"window": (0, 0), "global_tokens": chosen}
    for mask in (MASKS["all"], {"window": (1, 1), "causal": True}, local, {"ranks": ranks}):
        assert torch.autograd.gradcheck(
            lambda x, mask=mask: fastbert.attention(*x.unbind(1), cu_seqlens, 5, dropout_p=0.3, seed=SEED, **mask),
            (qkv.requires_grad_(),),
        )


@pytest.mark.parametrize(
    ("lengths", "p"), [([3, 12], 0.5), ([150, 29], 0.1), ([9, 2], 1.0)], ids=["a tail", "several blocks", "all dropped"]
)
def test_mask_is_the_contracts(backend, lengths, p):
    """With equal scores and one-hot values `out` is the dropped weights themselves."""
    heads, longest = 2, max(lengths)
    total = sum(lengths)
    q = torch.zeros(total, heads, longest)
    place = torch.cat([torch.arange(n) for n in lengths])
    v = torch.nn.functional.one_hot(place, longest).float().unsqueeze(1).expand(total, heads, longest)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = fastbert.attention(q, q, v, cu_seqlens, longest, dropout_p=p, seed=SEED)
    t = philox.threshold(p, bits=8)
    query, head = torch.arange(total).view(-1, 1, 1), torch.arange(heads).view(1, -1, 1)
    keep = philox.lanes(longest, query, head, 1, SEED, bits=8) >= t
    length = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths)).view(-1, 1, 1)
    expected = torch.where(keep & (torch.arange(longest) < length), philox.scale(t, bits=8) / length, 0.0)
    torch.testing.assert_close(out, expected)


def test_a_sequence_alone_gives_the_same(backend):
    """What stands beside a sequence in the batch changes nothing (without dropout, whose counters are the batch's)."""
    lengths = [37, 70, 5]
    qkv, cu_seqlens = pack(lengths, 2, 32, torch.float32)
    whole = fastbert.attention(*qkv.unbind(1), cu_seqlens, 70)
    alone = fastbert.attention(*qkv[37:107].unbind(1), torch.tensor([0, 70], dtype=torch.int32), 70)
    torch.testing.assert_close(whole[37:107], alone, rtol=1e-6, atol=1e-6)


def test_extreme_scores(backend):
    qkv, cu_seqlens = pack([50], 2, 16, torch.float32)
    q, k, v = qkv.unbind(1)
    out = fastbert.attention(q * 100, k * 100, v, cu_seqlens, 50)
    truth = fastbert.attention(q.double() * 100, k.double() * 100, v.double(), cu_seqlens, 50, backend="reference")
    # Scores reach tens of thousands, and an exponent carries their rounding: a few ulp of the largest.
    largest = 1e4 * (q.norm(dim=-1).max() * k.norm(dim=-1).max() / 4).item()
    assert (out.double() - truth).abs().max() < largest * 2**-21


def test_nan_stays_in_its_sequence_and_head(backend):
    qkv, cu_seqlens = pack([20, 20], 2, 16, torch.float32)
    qkv[3, 0, 0, 5] = torch.nan
    out = fastbert.attention(*qkv.unbind(1), cu_seqlens, 20)
    assert out[3, 0].isnan().all()
    out[3, 0] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("mask", ["all", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(kernels, dtype, mask):
    """Many threads cut a sequence into several tasks, one thread takes it whole."""
    for lengths in ([128, 40, 200, 1], [600]):
        qkv, cu_seqlens = pack(lengths, 2, 32, dtype)
        dout = torch.randn(sum(lengths), 2, 32)
        options = {"dropout_p": 0.1, "seed": SEED, **MASKS[mask]}

        def function(x, cu_seqlens=cu_seqlens, lengths=lengths, options=options):
            return fastbert.attention(*x.unbind(1), cu_seqlens, max(lengths), **options)

        assert_same_for_threads(lambda f=function, qkv=qkv, dout=dout: run(f, (qkv,), dout), (1, 2, 16))


def test_what_is_not_finite_is_so_for_any_number_of_threads(kernels):
    """Behind a window too, where a weight of 0 meets it or does not."""
    qkv, cu_seqlens = pack([1100], 2, 16, torch.float32)
    qkv[5, 2] = torch.inf

    def ours():
        out = fastbert.attention(*qkv.unbind(1), cu_seqlens, 1100, window=(10, 10))
        return [out.nan_to_num(nan=7.0, posinf=8.0)]

    assert_same_for_threads(ours)


def test_a_query_whose_scores_are_all_minus_infinity_gives_0(backend):
    q, v = torch.full((12, 2, 8), 1e20), torch.randn(12, 2, 8)
    cu_seqlens, dout = torch.tensor([0, 7, 12], dtype=torch.int32), torch.randn(12, 2, 8)
    results = run(lambda *qkv: fastbert.attention(*qkv, cu_seqlens, 7), (q, -q, v), dout)
    assert all(not x.any() for x in results)


def test_a_window_without_limits_or_as_wide_as_ints_sees_all(backend):
    """-1 sets no limit to its side, as FlashAttention means it."""
    qkv, cu_seqlens = pack([600], 2, 16, torch.float32)
    whole = fastbert.attention(*qkv.unbind(1), cu_seqlens, 600)
    for window in ((-1, -1), [-1, 600], (sys.maxsize, -1), (600, 2**70)):
        assert torch.equal(fastbert.attention(*qkv.unbind(1), cu_seqlens, 600, window=window), whole)


BEYOND_A_TASK = torch.tensor([0, 2100, 2110], dtype=torch.int32)


def attention_beyond_a_task(qkv):
    return fastbert.attention(*qkv.unbind(1), BEYOND_A_TASK, 2100)


@functools.cache
def judged_beyond_a_task():
    generator = drawn("beyond a task")
    qkv, dout = (torch.randn(2110, *n, 1, 16, generator=generator) for n in ((3,), ()))
    return problem((qkv,), dout, attention_beyond_a_task)


def test_a_sequence_longer_than_a_task(kernels):
    """Its gradients come in pieces, of queries and of keys, from a scratch that does not grow with it."""
    assert_solves(attention_beyond_a_task, judged_beyond_a_task(), ("out", "dqkv"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_projection_gives_the_same(backend, dtype):
    qkv, cu_seqlens = pack([11, 30], 3, 16, dtype)
    dout = torch.randn(41, 3, 16).to(dtype)
    options = {"dropout_p": 0.1, "seed": SEED, "window": (9, 4)}
    packed = run(lambda x: fastbert.attention_qkv(x, cu_seqlens, 30, **options), (qkv,), dout)
    apart = run(lambda *x: fastbert.attention(*x, cu_seqlens, 30, **options), qkv.unbind(1), dout)
    assert torch.equal(packed[0], apart[0])
    assert torch.equal(packed[1], torch.stack(apart[1:], 1))
    with pytest.raises(ValueError, match=r"qkv must be \[tokens, 3, heads, head size\]"):
        fastbert.attention_qkv(qkv[:, :2], cu_seqlens, 30)


def test_any_layout(backend):
    qkv, cu_seqlens = pack([11, 30], 3, 16, torch.float32)
    expected = fastbert.attention(*(x.contiguous() for x in qkv.unbind(1)), cu_seqlens, 30)
    assert torch.equal(fastbert.attention(*qkv.unbind(1), cu_seqlens, 30), expected)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
    assert torch.equal(fastbert.attention(*heads_first, cu_seqlens, 30), expected)


def test_autocast_computes_in_its_dtype():
    qkv, cu_seqlens = pack([5], 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastbert.attention(*qkv.requires_grad_().unbind(1), cu_seqlens, 5)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and qkv.grad.dtype == torch.float32


def test_autocast_rounds_nothing_within(backend):
    """Its cast of the inputs aside: scores and sums are float32 in the twin too."""
    qkv, cu_seqlens = pack([30, 34], 2, 32, torch.float32)
    dout = torch.randn(64, 2, 32).bfloat16()
    function = lambda x: fastbert.attention_qkv(x, cu_seqlens, 34)  # noqa: E731
    expected = run(function, (qkv.bfloat16(),), dout)
    with torch.autocast("cpu", torch.bfloat16):
        out, dqkv = run(function, (qkv,), dout)
    assert torch.equal(out, expected[0]) and torch.equal(dqkv, expected[1].float())


def test_bad_input():
    qkv, cu_seqlens = pack([5, 4], 2, 8, torch.float32)
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match=r"q must be \[tokens, heads, head size\]"):
        fastbert.attention(q[0], k[0], v[0], cu_seqlens, 5)
    with pytest.raises(ValueError, match="k must be like q"):
        fastbert.attention(q, k[:3], v, cu_seqlens, 5)
    with pytest.raises(ValueError, match="v must be like q"):
        fastbert.attention(q, k, v.double(), cu_seqlens, 5)
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        fastbert.attention(q, k, v, cu_seqlens.long(), 5)
    with pytest.raises(ValueError, match="end at the number of tokens, 9"):
        fastbert.attention(q, k, v, torch.tensor([0, 5, 8], dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="never decrease"):
        fastbert.attention(q, k, v, torch.tensor([0, 10, 9], dtype=torch.int32), 10)
    with pytest.raises(ValueError, match="longest sequence has 5"):
        fastbert.attention(q, k, v, cu_seqlens, 4)
    for bad in ((1, 2, 3), 5, "ab", torch.tensor([1, 2])):
        with pytest.raises(TypeError, match=r"window must be \(left, right\), two ints, or None"):
            fastbert.attention(q, k, v, cu_seqlens, 5, window=bad)
    with pytest.raises(ValueError, match=r"at least 0, or -1 for no limit to that side, got \(4, -2\)"):
        fastbert.attention(q, k, v, cu_seqlens, 5, window=(4, -2))
    with pytest.raises(TypeError, match="window's right must be an int, got float"):
        fastbert.attention(q, k, v, cu_seqlens, 5, window=(1, 2.0))
    chosen = torch.zeros(9, dtype=torch.bool)
    with pytest.raises(ValueError, match="global_tokens need a window"):
        fastbert.attention(q, k, v, cu_seqlens, 5, global_tokens=chosen)
    with pytest.raises(ValueError, match="global_tokens do not go with causal"):
        fastbert.attention(q, k, v, cu_seqlens, 5, window=(1, 1), causal=True, global_tokens=chosen)
    for bad in (chosen[:8], chosen.int(), chosen.view(1, 9)):
        with pytest.raises(ValueError, match=r"global_tokens must be bool \[9\], one for each token, on cpu, got"):
            fastbert.attention(q, k, v, cu_seqlens, 5, window=(1, 1), global_tokens=bad)
    ranks = torch.zeros(9, dtype=torch.int32)
    for others, named in (
        ({"causal": True, "window": (1, 1)}, "causal and window"),
        ({"window": (1, 1), "global_tokens": chosen}, "window and global_tokens"),
    ):
        with pytest.raises(ValueError, match=f"go with neither causal, window nor global_tokens, got {named}"):
            fastbert.attention(q, k, v, cu_seqlens, 5, ranks=(ranks, ranks), **others)
    for bad in (ranks, (ranks,), "ab"[:1]):
        with pytest.raises(TypeError, match=r"ranks must be \(query_ranks, key_ranks\), two tensors, or None"):
            fastbert.attention(q, k, v, cu_seqlens, 5, ranks=bad)
    for bad in (ranks[:8], ranks.long(), ranks.view(1, 9)):
        with pytest.raises(ValueError, match=r"key_ranks must be int32 \[9\], one for each token, on cpu, got"):
            fastbert.attention(q, k, v, cu_seqlens, 5, ranks=(ranks, bad))
    with pytest.raises(TypeError, match=r"query_ranks must be a torch\.Tensor, got list"):
        fastbert.attention(q, k, v, cu_seqlens, 5, ranks=(ranks.tolist(), ranks))
    for bad in (-1, 2**31):
        with pytest.raises(ValueError, match=r"max_seqlen must lie in \[0, 2\*\*31\)"):
            fastbert.attention(q, k, v, cu_seqlens, bad)
    for bad in (5.0, True, None, torch.tensor(5)):
        with pytest.raises(TypeError, match="max_seqlen must be an int, got "):
            fastbert.attention_qkv(qkv, cu_seqlens, bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            fastbert.attention(q, k, v, cu_seqlens, 5, scale=bad)
    with pytest.raises(TypeError, match="scale must be a number, got str 'x'"):
        fastbert.attention(q, k, v, cu_seqlens, 5, scale="x")
    with pytest.raises(TypeError, match="causal must be True or False, got int 1"):
        fastbert.attention(q, k, v, cu_seqlens, 5, causal=1)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor, got list"):
        fastbert.attention(q, k, v, [0, 5, 9], 5)
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor, got list"):
        fastbert.attention(q, k.tolist(), v, cu_seqlens, 5)


def test_tokens_that_are_read_have_the_output_and_gradient_of_all(backend):
    """Some of them twice, one sequence with none; nothing but their output is kept."""
    qkv = torch.randn(17, 3, 2, 8, requires_grad=True)
    cu_seqlens, read = torch.tensor([0, 5, 6, 17], dtype=torch.int32), torch.tensor([0, 9, 0, 16, 5, 9])
    dout = torch.randn(6, 2, 8)

    def results(way):
        out = way()
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    options = {"dropout_p": 0.3, "seed": 5}
    ours = results(lambda: fastbert.attention_qkv(qkv, cu_seqlens, 11, read=read, **options))
    expected = results(lambda: fastbert.attention_qkv(qkv, cu_seqlens, 11, **options)[read])
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert torch.equal(fastbert.attention_qkv(qkv, cu_seqlens, 11, read=read, **options), ours[0])
    with pytest.raises(ValueError, match=r"read must be int64 \[R\] on qkv's device"):
        fastbert.attention_qkv(qkv, cu_seqlens, 11, read=read.int())
