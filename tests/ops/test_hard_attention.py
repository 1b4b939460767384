import math

import pytest
import torch
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

import fastbert
from fastbert.counter_random import philox_words
from fastbert.testing import run

SEED = torch.tensor([0x123456789ABCDEF])
BOUNDS = torch.tensor([0, 5, 5, 6, 18], dtype=torch.int32)
LENGTHS = [5, 0, 1, 12]
GLOBAL = torch.zeros(18, dtype=torch.bool)
GLOBAL[[2, 17]] = True
MASKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "sees nothing at first": {"window": (-1, -1), "causal": True},
    "global tokens": {"window": (1, 1), "global_tokens": GLOBAL},
}


LONG = [70, 0, 40]  # a tile and more


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def noise(tokens, first, heads, seed):
    """[N, L, L] for one sequence, by the contract of philox alone, word by word."""
    rows = torch.arange(first, first + tokens).view(1, -1, 1)
    keys, head = torch.arange(tokens).view(1, 1, -1), torch.arange(heads).view(-1, 1, 1)
    words = torch.stack(torch.broadcast_tensors(*philox_words(keys // 4, rows, head, 3, seed)), -1)
    word = words.gather(-1, (keys % 4).expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return -torch.log(-torch.log(((word >> 9) + 0.5).double() / 2**23))


def straight_through(qkv, temperature, gumbel, causal=False, window=None, global_tokens=None):
    """The op as its formula has it, differentiated by torch: weights are onehot + P - P without gradient."""
    outputs, first, chosen = [], 0, torch.zeros(18, dtype=torch.bool) if global_tokens is None else global_tokens
    for part, g in zip(qkv.split(LENGTHS), chosen.split(LENGTHS), strict=True):
        if len(part):
            q, k, v = (x.transpose(0, 1) for x in part.unbind(1))  # [N, L, D]
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if gumbel:
                scores = scores + noise(len(part), first, len(q), SEED)
            ahead = torch.arange(len(part)) - torch.arange(len(part)).unsqueeze(1)
            left, right = (len(part) if limit == -1 else limit for limit in window or (-1, -1))
            seen = (ahead >= -left) & (ahead <= (min(right, 0) if causal else right)) | g | g.unsqueeze(1)
            scores = scores.masked_fill(~seen, -torch.inf)
            soft = (scores / temperature).softmax(-1)
            hard = torch.nn.functional.one_hot(scores.argmax(-1), len(part)).to(soft)
            outputs.append(((hard + soft - soft.detach()) @ v).transpose(0, 1))
        first += len(part)
    return torch.cat(outputs)


@pytest.mark.parametrize("gumbel", [False, True], ids=["best", "gumbel"])
@pytest.mark.parametrize("mask", MASKS)
def test_is_the_straight_through_estimator(mask, gumbel):
    generator = drawn("hard attention", mask, gumbel)
    qkv = torch.randn(18, 3, 2, 6, generator=generator, dtype=torch.float64)
    dout = torch.randn(18, 2, 6, generator=generator, dtype=torch.float64)
    options = {"temperature": 0.7, "gumbel": gumbel, **MASKS[mask]}
    ours = run(lambda x: fastbert.hard_attention(*x.unbind(1), BOUNDS, 12, seed=SEED, **options), (qkv,), dout)
    theirs = run(lambda x: straight_through(x, **options), (qkv,), dout)
    torch.testing.assert_close(ours, theirs)


def test_by_hand():
    """Of the equal best keys the first; a score that is NaN shows; a query that sees nothing gives 0."""
    q, v = torch.ones(4, 1, 1).double(), torch.tensor([3.0, 6.0, 9.0, 5.0]).double().view(4, 1, 1)
    k = torch.tensor([1.0, 2.0, 2.0, 7.0]).double().view(4, 1, 1)
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    results = run(lambda *x: fastbert.hard_attention(*x, bounds, 3), (q, k, v), torch.ones(4, 1, 1))
    assert results[0].flatten().tolist() == [6.0, 6.0, 6.0, 5.0]
    assert results[3].flatten().tolist() == [0.0, 3.0, 0.0, 1.0]  # dv: how many chose it
    # P = (1, e, e) / (1 + 2 e), for each query; dout . v = 3, 6, 9, of which the mean by P is m
    p = torch.tensor([1.0, math.e, math.e], dtype=torch.float64) / (1 + 2 * math.e)
    dscores = p * (v[:3].flatten() - p @ v[:3].flatten())
    torch.testing.assert_close(results[2].flatten(), torch.cat([3 * dscores, torch.zeros(1).double()]))
    k[1] = torch.nan
    assert fastbert.hard_attention(q, k, v, bounds, 3).flatten().isnan().tolist() == [True, True, True, False]
    out, best, lse = fastbert.ops.hard_attention.reference.hard_attention_forward(
        1e308 * q, -1e308 * q, v, bounds, 3, 1.0, 1.0, None, False, None
    )
    assert not out.any() and best.eq(-1).all() and lse.eq(-torch.inf).all()


def test_gumbel_draws_keys_by_their_softmax():
    """12,000 draws of one query's key; counts stay within four standard deviations."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    heads = 12000
    q, k = torch.ones(4, heads, 1).double(), weights.log().view(4, 1, 1).expand(4, heads, 1)
    v = torch.arange(4.0).double().view(4, 1, 1).expand(4, heads, 1)
    out = fastbert.hard_attention(q, k, v, torch.tensor([0, 4], dtype=torch.int32), 4, gumbel=True, seed=SEED)
    for row in out.squeeze(-1):
        counts = torch.bincount(row.long(), minlength=4) / heads
        assert ((counts - weights).abs() < 4 * (weights * (1 - weights) / heads).sqrt()).all()


def test_seeds_and_dtypes():
    qkv = torch.randn(18, 3, 2, 6, generator=drawn("hard attention", "seeds"))

    def draw(x, **options):
        return fastbert.hard_attention(*x.unbind(1), BOUNDS, 12, gumbel=True, **options)

    torch.manual_seed(1)
    first, second = draw(qkv), draw(qkv)
    torch.manual_seed(1)
    assert torch.equal(draw(qkv), first) and not torch.equal(second, first)
    assert torch.equal(draw(qkv, seed=5), draw(qkv, seed=torch.tensor([5])))
    assert torch.equal(draw(qkv.bfloat16().float(), seed=5).bfloat16(), draw(qkv.bfloat16(), seed=5))
    nothing = torch.zeros(0, 3, 2, 6, requires_grad=True)
    out = fastbert.hard_attention(*nothing.unbind(1), BOUNDS[:1], 0)
    out.sum().backward()
    assert out.shape == (0, 2, 6) and nothing.grad.shape == nothing.shape


def test_bad_input_and_backends():
    q = torch.randn(6, 2, 4).double()
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
            fastbert.hard_attention(q, q, q, bounds, 6, temperature=bad)
    with pytest.raises(TypeError, match="gumbel must be True or False, got int 1"):
        fastbert.hard_attention(q, q, q, bounds, 6, gumbel=1)
    with pytest.raises(ValueError, match="global_tokens need a window"):
        fastbert.hard_attention(q, q, q, bounds, 6, global_tokens=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="backend 'cpu' was asked for and cannot run hard_attention here"):
        fastbert.hard_attention(q, q, q, bounds, 6, backend="cpu")


# ---- kernels ---------------------------------------------------------------------------------------------------------

CASES = {  # lengths, head size, mask: which path each takes
    "short": (LENGTHS, 6, {}),
    "tiles": (LONG, 64, {}),
    "causal, of odd size": (LONG, 33, {"causal": True}),
    "window, wider than a tile's columns": ([70, 5], 80, {"window": (20, 3)}),
    "sees nothing at first": (LENGTHS, 8, {"window": (-1, -1), "causal": True}),
    "one key ahead": (LONG, 16, {"window": (0, 1)}),
}


def given(case, dtype, lengths, size):
    generator = drawn("hard attention", case, dtype)
    qkv = torch.randn(sum(lengths), 3, 2, size, generator=generator).to(dtype)
    return qkv, torch.randn(sum(lengths), 2, size, generator=generator)


def solves(case, dtype, lengths, size, mask, gumbel):
    """Against the twin in float64, whose choices stand far enough from the next best that no rounding changes one."""
    qkv, dout = given(case, dtype, lengths, size)
    options = bounds_of(lengths), max(lengths)
    rest = {"temperature": 0.6, "gumbel": gumbel, "seed": SEED, **mask}

    def function(x):
        return fastbert.hard_attention(*x.unbind(1), *options, **rest)

    case = problem((qkv,), dout, function)
    assert (case.truth[0] - case.baseline[0].double()).abs().max() < 0.1, "choices hang on a rounding: draw others"
    assert_solves(function, case, ("out", "dqkv"))


@pytest.mark.parametrize("gumbel", [False, True], ids=["best", "gumbel"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, nan_filled, case, gumbel):
    solves(case, torch.float32, *CASES[case], gumbel)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes_against_float64(backend, nan_filled, dtype):
    solves("tiles", dtype, [70, 1], 32, {}, True)


def test_global_tokens_against_float64(backend, nan_filled):
    tokens = torch.zeros(sum(LONG), dtype=torch.bool)
    tokens[[0, 40, 41, 70, 105]] = True
    solves("global", torch.float32, LONG, 16, {"window": (4, 4), "global_tokens": tokens}, True)


def test_of_equal_scores_the_first(backend):
    """Scores of small whole numbers are exact, in any order of sums, and most rows have several of the highest."""
    qkv = torch.randint(-1, 2, (sum(LONG), 3, 2, 6), generator=drawn("ties")).float()
    options = bounds_of(LONG), max(LONG), 0.5, 1.0, None, True, None
    op = fastbert.ops.hard_attention
    true = op.reference.hard_attention_forward(*qkv.double().unbind(1), *options)
    ours = op.functions[backend].hard_attention_forward(*qkv.unbind(1), *options)
    assert torch.equal(ours[1], true[1]) and torch.equal(ours[0].double(), true[0])
    torch.testing.assert_close(ours[2].double(), true[2])


def test_no_numbers(backend):
    """Scores of inf, of -inf alone, and NaN, also of a key that is not seen: out, best, lse and dv."""
    q, v = torch.ones(6, 1, 1), torch.arange(1.0, 7).view(6, 1, 1)
    k = torch.tensor([1.0, torch.inf, 2.0, -torch.inf, torch.nan, 5.0]).view(6, 1, 1)
    bounds = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    functions = fastbert.ops.hard_attention.functions[backend]
    options = bounds, 3, 1.0, 1.0, None, True, None
    out, best, lse = functions.hard_attention_forward(q, k, v, *options)
    nan = torch.nan
    expected = torch.tensor([1.0, 2.0, 2.0, 0.0, nan, nan])
    torch.testing.assert_close(out.flatten(), expected, equal_nan=True)
    assert best.flatten().tolist() == [0, 1, 1, -1, -1, -1]
    expected = torch.tensor([1.0, torch.inf, torch.inf, -torch.inf, nan, nan])
    torch.testing.assert_close(lse.flatten(), expected, equal_nan=True)
    dqkv = functions.hard_attention_backward(torch.ones(6, 1, 1), q, k, v, best, lse, *options)
    assert dqkv[:, 2].flatten().tolist() == [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_noise_is_the_contracts(backend):
    """Scores of 0 leave the noise alone: its choices, and its sum at a low temperature, which is the highest."""
    tokens, op = 130, fastbert.ops.hard_attention
    zero = torch.zeros(tokens, 2, 4)
    options = bounds_of([1, tokens - 1]), tokens - 1, 1.0, 2**-6, SEED, False, None
    _, best, lse = op.functions[backend].hard_attention_forward(zero, zero, zero, *options)
    g = noise(tokens, 0, 2, SEED)[:, 1:, : tokens - 1]  # [N, queries, keys]
    assert torch.equal(best[1:].T, g.argmax(-1).int())
    highest = (g * 64).logsumexp(-1) / 64
    torch.testing.assert_close(lse[1:].T.double() / 64, highest, rtol=3e-7, atol=3e-7)


def test_the_same_bits_whatever_the_threads(kernels):
    qkv, dout = given("threads", torch.float32, [600, 3, 40], 16)
    options = bounds_of([600, 3, 40]), 600

    def results():
        return run(lambda x: fastbert.hard_attention(*x.unbind(1), *options, gumbel=True, seed=5), (qkv,), dout)

    assert_same_for_threads(results)


def test_long_sequences_pass_through_several_blocks(kernels):
    """600 keys are two blocks of forward and of noise; the window leaves the first to some queries alone."""
    solves("long", torch.float32, [600], 8, {}, True)
    solves("long window", torch.float32, [1100, 5], 8, {"window": (100, 30)}, True)


def test_annealed_temperature():
    assert fastbert.annealed_temperature(0) == 1.0
    assert fastbert.annealed_temperature(1000, rate=1e-3, start=2.0) == 2.0 * math.exp(-1)
    assert fastbert.annealed_temperature(10**9) == 0.5
    with pytest.raises(ValueError, match="step and rate must be at least 0"):
        fastbert.annealed_temperature(-1)
    with pytest.raises(ValueError, match="start and end must be above 0"):
        fastbert.annealed_temperature(1, end=0.0)
