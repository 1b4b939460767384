"""attention by the C++ modules; the contract is in `fastbert.ops.attention`."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, launcher

NO_LIMIT = 2**31  # of a window: past every sequence


def attention_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, cu_seqlens = heads_together(q), heads_together(k), heads_together(v), cu_seqlens.contiguous()
    tokens, heads, head_size = q.shape
    out = q.new_empty(tokens, heads, head_size)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not q.is_cpu:
        check_sequences(cu_seqlens, options[0], tokens)
    module, launch = launcher(q)
    bad = module.attention_forward(*shared(q, k, v, cu_seqlens, launch, *options), out.data_ptr(), lse.data_ptr())
    if bad >= 0:
        check_sequences(cu_seqlens, options[0], q.shape[0])
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, *options: Any
) -> Tensor:
    q, k, v, cu_seqlens = heads_together(q), heads_together(k), heads_together(v), cu_seqlens.contiguous()
    dout, out = dout.contiguous(), out.contiguous()
    tokens, heads, head_size = q.shape
    dqkv = q.new_empty(tokens, 3, heads, head_size)
    module, launch = launcher(q)
    floats = module.attention_scratch(tokens, heads, head_size)
    scratch = q.new_empty(floats, dtype=torch.float32) if floats else None
    numbers = shared(q, k, v, cu_seqlens, launch, *options)
    module.attention_backward(
        *numbers, dout.data_ptr(), out.data_ptr(), lse.data_ptr(), dqkv.data_ptr(), address(scratch)
    )
    return dqkv


def shared(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, launch: int, max_seqlen: int, scale: float, t: int,
    seed: Tensor | None, causal: bool, window: list[int] | None, global_tokens: Tensor | None = None,
    query_ranks: Tensor | None = None, key_ranks: Tensor | None = None,
) -> tuple:  # fmt: skip
    """What both directions take, in the order of the struct `Attention`."""
    tokens, heads, head_size = q.shape
    left, right = (NO_LIMIT, NO_LIMIT) if window is None else window
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cu_seqlens.data_ptr(), max_seqlen, scale, t, address(seed),
        left, min(right, 0) if causal else right, address(global_tokens), address(query_ranks),
        address(key_ranks), q.stride(0), k.stride(0), v.stride(0), tokens, cu_seqlens.numel() - 1, heads, head_size,
        DTYPES[q.dtype], launch,
    )  # fmt: skip


def heads_together(x: Tensor) -> Tensor:
    """[T, N, D] as the kernels take it: any stride between tokens, heads D apart."""
    _, between_heads, within = x.stride()
    return x if within == 1 and between_heads == x.shape[2] else x.contiguous()


def check_sequences(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
    """Raises unless the sequences make up the tokens. On a device they are not waited for, and their number is all."""
    if not 0 <= max_seqlen < NO_LIMIT:
        raise ValueError(f"max_seqlen must lie in [0, 2**31), as cu_seqlens is int32, got {max_seqlen}")
    if cu_seqlens.device.type != "cpu":
        if tokens > 0 and (max_seqlen == 0 or cu_seqlens.numel() == 1):
            raise ValueError(
                f"cu_seqlens and max_seqlen must make up the {tokens} tokens, got {cu_seqlens.numel() - 1} sequences "
                f"of at most {max_seqlen}"
            )
        return
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or any(length < 0 for length in lengths):
        raise ValueError(
            f"cu_seqlens must start at 0, never decrease and end at the number of tokens, {tokens}; got {bounds[:3]} "
            f"... {bounds[-1]}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {max(lengths)} tokens")
