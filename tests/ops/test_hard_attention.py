import math

import pytest
import torch
from op_cases import drawn

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
        fastbert.hard_attention(*3 * [q.float()], bounds, 6, backend="cpu")


def test_annealed_temperature():
    assert fastbert.annealed_temperature(0) == 1.0
    assert fastbert.annealed_temperature(1000, rate=1e-3, start=2.0) == 2.0 * math.exp(-1)
    assert fastbert.annealed_temperature(10**9) == 0.5
    with pytest.raises(ValueError, match="step and rate must be at least 0"):
        fastbert.annealed_temperature(-1)
    with pytest.raises(ValueError, match="start and end must be above 0"):
        fastbert.annealed_temperature(1, end=0.0)
