"""Multi-head attention over packed sequences, with dropout, forward and backward.

For a query i and a key j of the same sequence and head, where i sees j:

    s_ij = scale * q_i . k_j        lse_i = log(sum_j exp(s_ij))        P_ij = exp(s_ij - lse_i)
    out_i = sum_j dropout(P_ij) v_j

q, k, v, out are [T, N, D]: tokens of all sequences one after the other, heads, head size; sequence b holds the
tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`. lse is [T, N], -inf where a query sees no key: such a query gives 0 and
passes no gradient. Scores, P and sums are float32 (float64 for float64 inputs). Backward saves q, k, v, out and lse,
computes P and draws the mask again:

    delta_i = dout_i . out_i
    dS_ij = P_ij * (dropout'(dout_i . v_j) - delta_i)
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i dropout(P_ij) dout_i

and gives the three as one dqkv [T, 3, N, D].

i sees j within the window, and everywhere in its sequence where i or j is a global token (Longformer's rule). Ranks
give another rule: i sees the j of its sequence with key_rank_j <= query_rank_i, as in XLNet's two streams.

P_ij is dropped by counter `(key // 16, query, head, 1)`, 8-bit lane `key % 16` (see `philox`), with `query` the token's
place in the packed batch and `key` the key's place in its own sequence.
Sources: Vaswani et al., "Attention is all you need" (2017); Dao, "FlashAttention-2" (2023) for what backward saves;
Beltagy, Peters and Cohan, "Longformer" (2020) for global tokens; Yang et al., "XLNet" (2019) for ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backends import attention as kernels
from fastbert.backends import pick, requested
from fastbert.ops import philox
from fastbert.ops.attention_visible import check_ranks, check_visible
from fastbert.ops.checks import as_float, as_int, autocast, check_activation, check_tensor, wide, without_autocast
from fastbert.ops.embedding import has_kernel, table_gradient
from fastbert.ops.register import differentiated, once_differentiable, register

LANE_BITS = 8  # of dropout: a byte for each weight


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    global_tokens: Tensor | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within each sequence of a packed batch.

    Args:
        q, k, v: [T, N, D] (tokens, heads, head size), float32, bfloat16 or float16 (float64 on the reference backend);
            views of one packed projection are taken as they are. Under autocast float32 is cast to the autocast dtype.
        cu_seqlens: int32 [B + 1] on q's device, the sequences' first tokens and T: 0, ..., T, never decreasing.
        max_seqlen: tokens of the longest sequence, or more; an int.
        dropout_p: probability that an attention weight is dropped, rounded to a multiple of 1/256: 0.1 is 26/256, as
            FlashAttention's is too. The others are scaled for the rounded one, by 256/230 there. Above 0 it is at least
            1/256, and below 1 at most 255/256.
        seed: an int, or int64 [1] on q's device; None draws one from torch's default generator.
        scale: of the scores, a finite number; None is `1 / sqrt(D)`.
        causal: a query sees no key behind it.
        window: (left, right): a query at place i of its sequence sees keys i - left to i + right, two ints of which -1
            sets no limit to its side, as FlashAttention's window_size does; None sees all.
        global_tokens: bool [T] on q's device, beside a window: tokens that see all of their sequence and that all of
            it sees, Longformer's global attention. Their q, k and v are the same for both; Longformer has projections
            of their own, which a caller composes by two calls. The cost is that of the window, of each block of keys
            that has a global token, for all queries, and of each block of queries that has one, over all keys (a block
            is some 16 to 64 neighbours); so neighbours that are global cost little more than one.
        ranks: (query_ranks, key_ranks), both int32 [T] on q's device, any numbers: a query sees the keys of its
            sequence whose rank is at most its own, which goes with neither causal, window nor global_tokens. With a
            permutation of a sequence's places as key_ranks, the same as query_ranks is XLNet's content stream, and
            less 1 its query stream, which does not see its own token.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [T, N, D] in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError: a shape, dtype, device, number, window or ranks that do not fit; sequence boundaries
            that do not hold (looked at on the CPU only: elsewhere it would wait for the device).
        RuntimeError: an explicit backend that cannot run here.
    """
    check_inputs(q, k, v, cu_seqlens)
    options = _options(q, max_seqlen, dropout_p, seed, scale, causal, window, global_tokens, ranks)
    return _run(backend, cu_seqlens, options, autocast(q), autocast(k), autocast(v))


def attention_qkv(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    global_tokens: Tensor | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    read: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention(*qkv.unbind(1), ...)` for one packed projection, whose gradient is then written in one piece.

    Args:
        qkv: [T, 3, N, D]; the others are those of `attention`.
        read: int64 [R], the only tokens whose output is wanted, in [0, T), any number of times each; None for all. The
            backward pass then keeps the output of these alone.

    Returns:
        [T, N, D] in qkv's dtype, or [R, N, D] of the tokens `read`.

    Raises:
        As `attention` does; and ValueError where `read` is not int64 [R] on qkv's device.
    """
    check_packed("qkv", qkv, cu_seqlens, axes=4)
    if read is not None:
        check_tensor("read", read)
        if read.dtype != torch.int64 or read.dim() != 1 or read.device != qkv.device:
            raise ValueError(
                f"read must be int64 [R] on qkv's device {qkv.device}, got {read.dtype} {list(read.shape)} on "
                f"{read.device}"
            )
    options = _options(qkv, max_seqlen, dropout_p, seed, scale, causal, window, global_tokens, ranks)
    return _run(backend, cu_seqlens, options, autocast(qkv), read=read)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    """Raises unless q, k and v are alike, [T, N, D], and cu_seqlens may be theirs."""
    check_packed("q", q, cu_seqlens, axes=3)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x)
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be like q, {q.dtype} {list(q.shape)} on {q.device}, got {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )


def check_packed(name: str, x: Tensor, cu_seqlens: Tensor, axes: int) -> None:
    check_activation("attention", name, x)
    if x.dim() != axes or (axes == 4 and x.shape[1] != 3):
        expected = "[tokens, heads, head size]" if axes == 3 else "[tokens, 3, heads, head size]"
        raise ValueError(f"{name} must be {expected}, got shape {list(x.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens must be int32 [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}; make it with "
            "torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {name}'s device {x.device}, got {cu_seqlens.device}")


def _options(
    x: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | int | None,
    scale: float | None,
    causal: bool,
    window: tuple[int, int] | None,
    global_tokens: Tensor | None,
    ranks: tuple[Tensor, Tensor] | None,
) -> tuple:
    """Of the op, from `max_seqlen` on, checked."""
    max_seqlen, scale = check_numbers(x, max_seqlen, scale)
    visible = check_visible(x, causal, window, global_tokens)
    both_ranks = check_ranks(x, ranks, causal, window, global_tokens)
    t = philox.threshold(dropout_p, LANE_BITS)
    return max_seqlen, scale, t, philox.resolve_seed(seed, t, x.device), *visible, *both_ranks


def check_numbers(x: Tensor, max_seqlen: int, scale: float | None) -> tuple[int, float]:
    """max_seqlen and scale, of which None is `1 / sqrt(D)`."""
    max_seqlen = as_int("max_seqlen", max_seqlen)
    scale = 1.0 / math.sqrt(x.shape[-1]) if scale is None else as_float("scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale}")
    return max_seqlen, scale


def _run(
    backend: str | None, cu_seqlens: Tensor, options: tuple, *inputs: Tensor, read: Tensor | None = None
) -> Tensor:
    """Of (q, k, v), or of one (qkv)."""
    chosen = pick("attention", requested(backend), inputs[0])
    if differentiated(*inputs):
        return _Attention.apply(chosen, read, *inputs, cu_seqlens, *options)
    out, _ = functions[chosen].attention_forward(*_split(inputs), cu_seqlens, *options)
    return out if read is None else out.index_select(0, read)


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests.

    It pads to [B, N, S, D] by index arithmetic, never waiting for the device, and holds all scores in memory.
    """

    @staticmethod
    @without_autocast
    def attention_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, t: int,
        seed: Tensor | None, causal: bool, window: list[int] | None, global_tokens: Tensor | None = None,
        query_ranks: Tensor | None = None, key_ranks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        layout = Padding.checked(cu_seqlens, max_seqlen, q.shape[0])
        scores = scale * layout.pad(q) @ layout.pad(k).transpose(-1, -2)
        visible = layout.visible(causal, window, global_tokens, query_ranks, key_ranks)
        scores = scores.masked_fill(~visible, -torch.inf)  # [B, N, S, S]
        lse = scores.logsumexp(-1)
        weights = softmax_weights(scores, lse)
        if t > 0:
            weights = layout.dropout(weights, t, seed)
        return layout.unpad(weights @ layout.pad(v)).to(q.dtype), layout.unpad(lse.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @without_autocast
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        scale: float, t: int, seed: Tensor | None, causal: bool, window: list[int] | None,
        global_tokens: Tensor | None = None, query_ranks: Tensor | None = None, key_ranks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        dtype, layout = q.dtype, Padding(cu_seqlens, max_seqlen, q.shape[0])
        dout, out, q, k, v = (layout.pad(x) for x in (dout, out, q, k, v))
        scores = scale * q @ k.transpose(-1, -2)
        visible = layout.visible(causal, window, global_tokens, query_ranks, key_ranks)
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = softmax_weights(scores, layout.pad(lse.unsqueeze(-1)).squeeze(-1))
        dweights = dout @ v.transpose(-1, -2)
        dropped = weights
        if t > 0:
            dweights = layout.dropout(dweights, t, seed)
            dropped = layout.dropout(weights, t, seed)
        dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True))
        dq, dk, dv = scale * dscores @ k, scale * dscores.transpose(-1, -2) @ q, dropped.transpose(-1, -2) @ dout
        return torch.stack([layout.unpad(x) for x in (dq, dk, dv)], 1).to(dtype)


def softmax_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 in a row that sees no key, where that would be exp(-inf + inf)."""
    lse = lse.unsqueeze(-1)
    return torch.where(lse == -torch.inf, 0.0, torch.exp(scores - lse))


class Padding:
    """Index arithmetic between packed [T, N, D] and padded [B, N, S, D]."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, tokens: int):
        start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()  # [B, 1]
        self.place = torch.arange(max_seqlen, device=cu_seqlens.device)  # [S]
        self.token = start + self.place  # [B, S]
        self.real = self.token < end
        # The token at each place of the padded batch; the one after the last where there is none.
        self.source = torch.where(self.real, self.token, tokens)
        # Where packed token i stands in the padded batch read as [B * S].
        order = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens.contiguous(), order.int(), right=True) - 1
        self.slot = sequence * max_seqlen + order - cu_seqlens[sequence]

    @classmethod
    def checked(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> "Padding":
        """Raises unless the sequences make up the tokens, where a compiler does not look on."""
        if not torch.compiler.is_compiling():
            kernels.check_sequences(cu_seqlens, max_seqlen, tokens)
        return cls(cu_seqlens, max_seqlen, tokens)

    def pad(self, x: Tensor) -> Tensor:
        """Zeros where there is no token; float32, or float64 where x is."""
        zeros = x.new_zeros(1, *x.shape[1:])
        return wide(torch.cat([x, zeros]))[self.source].transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[self.slot].contiguous()

    def visible(
        self, causal: bool, window: list[int] | None, global_tokens: Tensor | None, query_ranks: Tensor | None = None,
        key_ranks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, 1, S, S]: whether a query (third axis) sees a key."""
        ahead = self.place - self.place[:, None]  # key - query
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if causal:
            seen = seen & (ahead <= 0)
        if window is not None:
            seen = seen & (ahead >= -window[0]) & (ahead <= window[1])
        if global_tokens is not None:
            chosen = self._at_places(global_tokens)
            seen = seen | chosen[:, None, :] | chosen[:, :, None]
        if query_ranks is not None:
            seen = self._at_places(key_ranks)[:, None, :] <= self._at_places(query_ranks)[:, :, None]
        return (seen & self.real[:, None, :] & self.real[:, :, None]).unsqueeze(1)

    def _at_places(self, x: Tensor) -> Tensor:
        """[B, S] of x [T]: 0 where there is no token."""
        return torch.cat([x, x.new_zeros(1)])[self.source]

    def dropout(self, weights: Tensor, t: int, seed: Tensor) -> Tensor:
        head = torch.arange(weights.shape[1], device=weights.device)[:, None, None]  # [N, 1, 1]
        keep = philox.lanes(weights.shape[-1], self.token[:, None, :, None], head, 1, seed, LANE_BITS) >= t
        return torch.where(keep, weights * philox.scale(t, LANE_BITS), 0.0)


def _fake_forward(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


functions = register(
    reference,
    kernels,
    attention_forward=_fake_forward,
    attention_backward=lambda dout, q, *_: q.new_empty(q.shape[0], 3, *q.shape[1:]),
)


class _Attention(torch.autograd.Function):
    """Of q, k and v, or of one qkv, and the op's other arguments behind them; `read` is `attention_qkv`'s.

    A token that is not read has no gradient of its output, so that backward multiplies its output by 0: zeros will do.
    """

    @staticmethod
    def forward(ctx, chosen, read, *arguments):
        inputs, others = arguments[:-10], arguments[-10:]
        cu_seqlens, max_seqlen, scale, t, seed, causal, window, *of_tokens = others
        out, lse = functions[chosen].attention_forward(*_split(inputs), *others)
        if read is not None:
            out = out.index_select(0, read)
        ctx.save_for_backward(out, lse, cu_seqlens, seed, read, *of_tokens, *inputs)
        ctx.options = chosen, max_seqlen, scale, t, causal, window
        ctx.by_kernel = has_kernel(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        out, lse, cu_seqlens, seed, read, global_tokens, query_ranks, key_ranks, *inputs = ctx.saved_tensors
        chosen, max_seqlen, scale, t, causal, window = ctx.options
        options = cu_seqlens, max_seqlen, scale, t, seed, causal, window, global_tokens, query_ranks, key_ranks
        if read is not None:
            tokens, shape = lse.shape[0], dout.shape[1:]
            dout = table_gradient(dout.flatten(1), read, tokens, None, False, ctx.by_kernel).unflatten(1, shape)
            out = out.new_zeros(tokens, *shape).index_copy_(0, read, out)
        dqkv = functions[chosen].attention_backward(dout, *_split(inputs), out, lse, *options)
        return None, None, *((dqkv,) if len(inputs) == 1 else dqkv.unbind(1)), *(None,) * 10


def _split(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """q, k and v."""
    return inputs[0].unbind(1) if len(inputs) == 1 else inputs
