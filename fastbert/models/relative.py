"""Attention with relative positions and segments, as Transformer-XL and XLNet have it, by the packed attention op.

For a query i and a key j of one sequence and head, at distance i - j:

    s_ij = (q_i + r_w_bias) . k_j + (q_i + r_r_bias) . r R_(i-j) + (q_i + r_s_bias) . seg_embed[differ_ij]

R_p = [sin(p w_1), ..., sin(p w_F), cos(p w_1), ..., cos(p w_F)], w_f = 10000^(-2f / H), F = H / 2, and differ_ij is 1
where the two tokens are of different segments.

The op knows of inner products alone, and there is no matrix of biases: all three terms are one inner product of a wider
query and a wider key. With u = (q_i + r_r_bias) . r, [H] = [us, uc], the addition theorems turn a distance into places,

    u . R_(i-j) = (us sin(iw) + uc cos(iw)) . cos(jw) + (uc sin(iw) - us cos(iw)) . sin(jw),

and the segment's term is, but for what is the same for all keys and so changes no softmax,

    (q_i + r_s_bias) . (seg_embed[0] - seg_embed[1])  where j's segment is i's, 0 elsewhere.

That is exact, and takes D + H + `SEGMENTS` columns where there were D; so attention costs that many times as much, and
more memory. Sources: Dai et al., "Transformer-XL" (2019); Yang et al., "XLNet" (2019).
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


class Relative(NamedTuple):
    """What every layer is told of a batch.

    Attributes:
        sines, cosines: [T, 1, H / 2], of a token's place times each frequency.
        segments: [T, 1, SEGMENTS], 1 at a token's segment and 0 elsewhere; None where all are of one.
        ranks: int32 [T] twice, which keys a query sees, as `attention` takes them; None for all.
    """

    sines: Tensor
    cosines: Tensor
    segments: Tensor | None
    ranks: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, places: Tensor, segments: Tensor | None, ranks: tuple[Tensor, Tensor] | None, size: int, dtype: torch.dtype
    ) -> "Relative":
        """Of integer places [T] and segments [T], for a hidden size and in a dtype."""
        half = torch.arange(0, size, 2, device=places.device, dtype=torch.float64)
        angles = places[:, None, None] * 10000.0 ** (-half / size)
        chosen = None if segments is None else F.one_hot(segments.long(), SEGMENTS)[:, None, :].to(dtype)
        return cls(angles.sin().to(dtype), angles.cos().to(dtype), chosen, ranks)


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
    """Queries and keys [T, N, D] -> those whose inner products are the scores, [T, N, D + H (+ SEGMENTS)].

    Sums are float32; so is the product with `r`, but on a GPU, where that of 16-bit queries is many times as fast.
    """
    sines, cosines, segments, _ = relative
    dtype = q.dtype if q.is_cuda else wide(q).dtype
    q, k = wide(q), wide(k)
    u = torch.einsum("tnd,hnd->tnh", (q + heads.r_r_bias).to(dtype), heads.r.to(dtype))
    us, uc = wide(u).chunk(2, 2)
    queries = [q + heads.r_w_bias, us * sines + uc * cosines, uc * sines - us * cosines]
    keys = [k, *(x.expand(-1, k.shape[1], -1) for x in (cosines, sines))]
    if segments is not None:
        same = ((q + heads.r_s_bias) * (heads.seg_embed[0] - heads.seg_embed[1])).sum(2, keepdim=True)
        queries.append(same * segments)
        keys.append(segments.expand(-1, k.shape[1], -1))
    return torch.cat(queries, 2), torch.cat(keys, 2)
