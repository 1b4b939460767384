"""Packed batches for attention, and what PyTorch's own attention makes of each sequence by itself."""

import torch
import torch.nn.functional as F

SEED = torch.tensor([0x123456789ABCDEF])


def pack(lengths, heads, head_dim, dtype, generator=None):
    """qkv [T, 3, N, D] and cu_seqlens."""
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator).mul(1.5).to(dtype)
    return qkv, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def torch_attention(q, k, v, lengths, causal=False, window=None, global_tokens=None, ranks=None):
    """PyTorch's own attention, one sequence at a time. A query that sees nothing gives 0, as ours does."""
    outputs = []
    chosen = torch.zeros(len(q), dtype=torch.bool) if global_tokens is None else global_tokens
    of_tokens = chosen, *(ranks or [torch.zeros(len(q))] * 2)
    for a, b, c, g, query_ranks, key_ranks in zip(*(x.split(lengths) for x in (q, k, v, *of_tokens)), strict=True):
        ahead = torch.arange(len(a)) - torch.arange(len(a)).unsqueeze(1)
        left, right = (len(a) if limit == -1 else limit for limit in window or (-1, -1))
        seen = (ahead >= -left) & (ahead <= (min(right, 0) if causal else right)) | g | g.unsqueeze(1)
        seen &= key_ranks <= query_ranks.unsqueeze(1)
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (a, b, c)), attn_mask=seen)
        outputs.append(torch.where(seen.any(1)[:, None, None], out.transpose(0, 1), 0.0))
    return torch.cat(outputs)
