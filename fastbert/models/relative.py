"""Attention with relative positions and segments, as Transformer-XL and XLNet have it, by the packed attention op.

For a query i and a key j of one sequence and head, at distance i - j:

    s_ij = (q_i + r_w_bias) . k_j + (q_i + r_r_bias) . r R_(i-j) + (q_i + r_s_bias) . seg_embed[differ_ij]

R_p = [sin(p w_1), ..., sin(p w_F), cos(p w_1), ..., cos(p w_F)], w_f = 10000^(-2f / H), F = H / 2, and differ_ij is 1
where the two tokens are of different segments.

The op knows of inner products alone, and of no biases: all three terms are one inner product of a wider query and a
wider key, exactly. The second is that of what belongs to i and what belongs to j in two ways, of which the narrower is
taken. By sinusoids, H columns: with u = (q_i + r_r_bias) . r, [H] = [us, uc], the addition theorems say

    u . R_(i-j) = (us sin(iw) + uc cos(iw)) . cos(jw) + (uc sin(iw) - us cos(iw)) . sin(jw)

By places, as many columns as a sequence has places: the query has the term itself for every place that a key may have,
and the key a 1 at its own. And the third term is, but for what is the same for all keys and so changes no softmax,

    (q_i + r_s_bias) . (seg_embed[0] - seg_embed[1])  where j's segment is i's, 0 elsewhere.

So a head has D + min(H, S) + `SEGMENTS` columns where there were D, and attention takes as much more time and memory.
Sources: Dai et al., "Transformer-XL" (2019); Yang et al., "XLNet" (2019).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert.models.layers import Linear
from fastbert.ops.attention import attention
from fastbert.ops.checks import wide, without_autocast

SEGMENTS = 8  # that can be told apart


class Sinusoids(NamedTuple):
    """Positions by the addition theorems: sines and cosines [T, 1, H / 2] of a token's place by each frequency."""

    sines: Tensor
    cosines: Tensor

    def keys(self) -> Tensor:
        """[T, 1, H]."""
        return torch.cat([self.cosines, self.sines], 2)

    def queries(self, q: Tensor, r: Tensor) -> Tensor:
        """q [T, N, D], r [H, N, D] -> [T, N, H], whose inner products with the keys are the second term."""
        us, uc = wide(torch.einsum("tnd,hnd->tnh", q, r)).chunk(2, 2)
        sines, cosines = self
        return torch.cat([us * sines + uc * cosines, uc * sines - us * cosines], 2)


class Places(NamedTuple):
    """Positions by the places of keys.

    Attributes:
        distances: R_p [2S - 1, H], of p = S - 1, ..., -(S - 1).
        own: [T, 1, S], 1 at a token's own place.
        ahead: int64 [T, 1, S], which of the distances lies between a token and each place.
    """

    distances: Tensor
    own: Tensor
    ahead: Tensor

    def keys(self) -> Tensor:
        """[T, 1, S]."""
        return self.own

    def queries(self, q: Tensor, r: Tensor) -> Tensor:
        """q [T, N, D], r [H, N, D] -> [T, N, S], the second term for a key at each place."""
        keys = torch.einsum("ph,hnd->pnd", self.distances.to(r.dtype), r)
        terms = wide(torch.einsum("tnd,pnd->tnp", q, keys))
        return terms.gather(2, self.ahead.expand(-1, q.shape[1], -1))


class Relative(NamedTuple):
    """What every layer is told of a batch.

    Attributes:
        positions: as it is computed with them.
        segments: [T, 1, SEGMENTS], 1 at a token's segment and 0 elsewhere; None where all are of one.
        ranks: int32 [T] twice, which keys a query sees, as `attention` takes them; None for all.
    """

    positions: Sinusoids | Places
    segments: Tensor | None
    ranks: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, places: Tensor, segments: Tensor | None, ranks: tuple[Tensor, Tensor] | None, end: int, size: int,
        dtype: torch.dtype,
    ) -> "Relative":  # fmt: skip
        """Of integer places [T], below `end`, and segments [T], for a hidden size and in a dtype."""
        chosen = None if segments is None else F.one_hot(segments.long(), SEGMENTS)[:, None, :].to(dtype)
        if end >= size:
            return cls(Sinusoids(*(x.unsqueeze(1) for x in sinusoids(places, size, dtype))), chosen, ranks)
        count = torch.arange(end, device=places.device)
        spread = torch.arange(end - 1, -end, -1, device=places.device)
        own = (places[:, None, None] == count).to(dtype)
        ahead = (end - 1 - places[:, None, None] + count).long()
        return cls(Places(torch.cat(sinusoids(spread, size, dtype), 1), own, ahead), chosen, ranks)


def sinusoids(places: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sines and cosines of places [P], [P, size / 2] each, of angles in float64."""
    half = torch.arange(0, size, 2, device=places.device, dtype=torch.float64)
    angles = places[:, None] * 10000.0 ** (-half / size)
    return angles.sin().to(dtype), angles.cos().to(dtype)


class RelativeAttention(nn.Module):
    """Self-attention of packed sequences by the formula above, from hidden states to the heads' outputs side by side.

    Args:
        hidden_size: H, even and a multiple of heads.
        heads: N, of size D = H / N.
        dropout_p: probability that an attention weight is dropped, in training mode only.

    Shapes: x [T, H], cu_seqlens int32 [B + 1], max_seqlen -> [T, H].
    """

    def __init__(self, hidden_size: int, heads: int, dropout_p: float = 0.0):
        super().__init__()
        self.heads, self.dropout_p = heads, dropout_p
        size = hidden_size // heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)  # rows: all of query, then key, then value
        self.r = nn.Parameter(torch.empty(hidden_size, heads, size))
        self.r_w_bias, self.r_r_bias, self.r_s_bias = (nn.Parameter(torch.empty(heads, size)) for _ in range(3))
        self.seg_embed = nn.Parameter(torch.empty(2, heads, size))

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that are no other module's, to be initialised."""
        return [self.r, self.r_w_bias, self.r_r_bias, self.r_s_bias, self.seg_embed]

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, relative: Relative
    ) -> Tensor:
        tokens, hidden = x.shape
        q, k, v = self.qkv(x).view(tokens, 3, self.heads, hidden // self.heads).unbind(1)  # [T, N, D]
        wide_q, wide_k = (part.to(v.dtype) for part in widened(q, k, self, relative))
        out = attention(
            wide_q, wide_k, F.pad(v, (0, wide_q.shape[2] - v.shape[2])), cu_seqlens, max_seqlen,
            dropout_p=self.dropout_p if self.training else 0.0, seed=seed, scale=1.0 / math.sqrt(v.shape[2]),
            ranks=relative.ranks,
        )  # fmt: skip
        return out[..., : v.shape[2]].flatten(1)


@without_autocast
def widened(q: Tensor, k: Tensor, heads: RelativeAttention, relative: Relative) -> tuple[Tensor, Tensor]:
    """Queries and keys [T, N, D] -> those whose inner products are the scores, [T, N, columns].

    Sums are float32; so are the products with `r`, but on a GPU, where those of 16-bit numbers are many times as fast.
    """
    dtype = q.dtype if q.is_cuda else wide(q).dtype
    q, k = wide(q), wide(k)
    positions, segments, _ = relative
    queries = [q + heads.r_w_bias, positions.queries((q + heads.r_r_bias).to(dtype), heads.r.to(dtype))]
    keys = [k, positions.keys().expand(-1, k.shape[1], -1)]
    if segments is not None:
        same = ((q + heads.r_s_bias) * (heads.seg_embed[0] - heads.seg_embed[1])).sum(2, keepdim=True)
        queries.append(same * segments)
        keys.append(segments.expand(-1, k.shape[1], -1))
    return torch.cat(queries, 2), torch.cat(keys, 2)
