"""Hard attention over packed sequences: each query takes the value of its best key, forward and backward.

For a query i and a key j that i sees (see `attention`), with temperature tau:

    s_ij = scale * q_i . k_j + g_ij        b_i = the first j with the greatest s_ij        out_i = v_{b_i}

g is 0, or Gumbel noise, by which b_i is drawn from softmax(scale * q_i . k) exactly (the Gumbel-max trick). The choice
has no gradient of its own. Backward takes that of the softmax at tau in its place, which is the straight-through
estimator: the weights are y = onehot(b) + P - stop_gradient(P), so that

    lse_i = log(sum_j exp(s_ij / tau))        P_ij = exp(s_ij / tau - lse_i)        dP_ij = dout_i . v_j
    dS_ij = P_ij * (dP_ij - sum_k P_ik dP_ik) / tau
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum of dout_i over the i with b_i = j

q, k, v, out are [T, N, D], as one dqkv [T, 3, N, D] in backward; best, int32 [T, N], is a place in the query's own
sequence, -1 where it sees no key (or has scores of -inf alone): such a query gives 0 and passes no gradient. A NaN
among the scores makes out and lse NaN, and best -1. Backward saves q, k, v, best and lse, and computes s again.

Noise of (query, head, key) is g = -log(-log(u)) with u = (w // 2**9 + 0.5) / 2**23 for word w = key % 4 of Philox's
counter `(key // 4, query, head, 3)` (see `philox`), `query` being the token's place in the packed batch and `key` the
key's place in its own sequence: the same on every backend, but for the last places of the logarithms.
Sources: Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons" (2013), for
straight-through; Jang, Gu and Poole, "Categorical reparameterization with Gumbel-softmax" (2017), for the noise and
for temperatures that fall in training.
"""

import math

import torch
from torch import Tensor

from fastbert.backends import hard_attention as kernels
from fastbert.backends import pick, requested
from fastbert.ops import philox
from fastbert.ops.attention import Padding, check_inputs, check_numbers, softmax_weights
from fastbert.ops.attention_visible import check_visible
from fastbert.ops.checks import as_float, as_int, autocast, kind, without_autocast
from fastbert.ops.register import differentiated, once_differentiable, register

NOISE = 3  # the counter's last word: 0 is layer_norm's, 1 attention's


def hard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    temperature: float = 1.0,
    gumbel: bool = False,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    global_tokens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each query takes the value of the key with its greatest score; of several, of the first.

    The gradient is straight-through: for q and k that of the softmax at `temperature` (which the forward pass does not
    depend on), for v that of what was chosen. See the module for the formulas.

    Args:
        q, k, v, cu_seqlens, max_seqlen, scale, causal, window, global_tokens: as `attention` takes them.
        temperature: tau of the gradient's softmax, above 0 and finite. Lower is nearer to the choice that was made and
            varies more; see `annealed_temperature`. A number of Python's: a captured CUDA graph keeps the one that it
            was captured with.
        gumbel: adds noise to the scores, so that a key is drawn by its softmax weight: straight-through
            Gumbel-softmax. For training; in evaluation the best key is taken.
        seed: of the noise, an int, or int64 [1] on q's device; None draws one from torch's default generator.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [T, N, D] in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention`; a temperature or `gumbel` that does not fit.
    """
    check_inputs(q, k, v, cu_seqlens)
    max_seqlen, scale = check_numbers(q, max_seqlen, scale)
    visible = check_visible(q, causal, window, global_tokens)
    temperature = as_float("temperature", temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if type(gumbel) is not bool:
        raise TypeError(f"gumbel must be True or False, got {kind(gumbel)} {gumbel!r}")
    seed = philox.resolve_seed(seed, int(gumbel), q.device)
    q, k, v = autocast(q), autocast(k), autocast(v)
    chosen = pick("hard_attention", requested(backend), q)
    options = cu_seqlens, max_seqlen, scale, temperature, seed, *visible
    if differentiated(q, k, v):
        return _HardAttention.apply(chosen, q, k, v, *options)
    return functions[chosen].hard_attention_forward(q, k, v, *options)[0]


def annealed_temperature(step: int, rate: float = 1e-4, start: float = 1.0, end: float = 0.5) -> float:
    """`max(end, start * exp(-rate * step))`, how Jang, Gu and Poole let the temperature fall (section 4.2).

    Args:
        step: of training, from 0 on.
        rate: by which it falls in a step, at least 0.
        start, end: the first temperature and the lowest, both above 0.

    Raises:
        ValueError, TypeError: a number that does not fit.
    """
    step = as_int("step", step)
    numbers = {"rate": as_float("rate", rate), "start": as_float("start", start), "end": as_float("end", end)}
    if step < 0 or not 0.0 <= numbers["rate"] < math.inf:
        raise ValueError(f"step and rate must be at least 0, and rate finite, got {step} and {rate}")
    if not (0.0 < numbers["start"] < math.inf and 0.0 < numbers["end"] < math.inf):
        raise ValueError(f"start and end must be above 0 and finite, got {start} and {end}")
    return max(numbers["end"], numbers["start"] * math.exp(-numbers["rate"] * step))


class reference:  # a namespace, spelled as a backend is
    """The op in plain PyTorch: any device, and float64. It holds all scores in memory."""

    @staticmethod
    @without_autocast
    def hard_attention_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, temperature: float,
        seed: Tensor | None, causal: bool, window: list[int] | None, global_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        layout = Padding.checked(cu_seqlens, max_seqlen, q.shape[0])
        scores = _scores(layout, layout.pad(q), layout.pad(k), scale, seed, causal, window, global_tokens)
        lse = (scores / temperature).logsumexp(-1)  # [B, N, S]
        nothing, undefined = lse == -torch.inf, lse.isnan()
        best = scores.argmax(-1) if max_seqlen else nothing.long()  # of equal ones the first
        out = layout.pad(v).gather(2, best.unsqueeze(-1).expand(*best.shape, v.shape[-1]))
        out = out.masked_fill(nothing.unsqueeze(-1), 0.0).masked_fill(undefined.unsqueeze(-1), torch.nan)
        best = best.masked_fill(nothing | undefined, -1).int()
        rows = (layout.unpad(x.unsqueeze(-1)).squeeze(-1) for x in (best, lse))
        return layout.unpad(out).to(q.dtype), *rows

    @staticmethod
    @without_autocast
    def hard_attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, best: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        scale: float, temperature: float, seed: Tensor | None, causal: bool, window: list[int] | None,
        global_tokens: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        dtype, layout = q.dtype, Padding(cu_seqlens, max_seqlen, q.shape[0])
        dout, q, k, v, lse = (layout.pad(x) for x in (dout, q, k, v, lse.unsqueeze(-1)))
        scores = _scores(layout, q, k, scale, seed, causal, window, global_tokens)
        weights = softmax_weights(scores / temperature, lse.squeeze(-1))  # [B, N, S, S]
        dweights = dout @ v.transpose(-1, -2)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) / temperature
        best = layout.pad(best.unsqueeze(-1) + 1) - 1  # padding has chosen none
        chosen = (best == layout.place).to(dout.dtype)
        dq, dk, dv = scale * dscores @ k, scale * dscores.transpose(-1, -2) @ q, chosen.transpose(-1, -2) @ dout
        return torch.stack([layout.unpad(x) for x in (dq, dk, dv)], 1).to(dtype)


def _scores(
    layout: Padding, q: Tensor, k: Tensor, scale: float, seed: Tensor | None, causal: bool, window: list[int] | None,
    global_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B, N, S, S] with noise, -inf where a query does not see the key."""
    scores = scale * q @ k.transpose(-1, -2)
    if seed is not None:
        scores = scores + gumbel_noise(layout, scores, seed)
    return scores.masked_fill(~layout.visible(causal, window, global_tokens), -torch.inf)


def gumbel_noise(layout: Padding, scores: Tensor, seed: Tensor) -> Tensor:
    """Like the scores [B, N, S, S]: standard Gumbel, from -2.82 to 16.64, by where an element stands."""
    head = torch.arange(scores.shape[1], device=scores.device)[:, None, None]  # [N, 1, 1]
    words = philox.lanes(scores.shape[-1], layout.token[:, None, :, None], head, NOISE, seed, 32)
    # Of 24 binary places, so float32 holds it as it is: never 0 or 1.
    uniform = ((words >> 9).to(scores.dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _fake_forward(q, *_):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.int32), q.new_empty(q.shape[:2], dtype=dtype)


functions = register(
    reference,
    kernels,
    hard_attention_forward=_fake_forward,
    hard_attention_backward=lambda dout, q, *_: q.new_empty(q.shape[0], 3, *q.shape[1:]),
)


class _HardAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, q, k, v, *options):
        cu_seqlens, max_seqlen, scale, temperature, seed, causal, window, global_tokens = options
        out, best, lse = functions[chosen].hard_attention_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, best, lse, cu_seqlens, seed, global_tokens)
        ctx.options = chosen, max_seqlen, scale, temperature, causal, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, best, lse, cu_seqlens, seed, global_tokens = ctx.saved_tensors
        chosen, max_seqlen, scale, temperature, *visible = ctx.options
        options = cu_seqlens, max_seqlen, scale, temperature, seed, *visible, global_tokens
        dqkv = functions[chosen].hard_attention_backward(dout, q, k, v, best, lse, *options)
        return None, *dqkv.unbind(1), *(None,) * 8
