"""hard_attention by the C++ modules; the contract is in `fastbert.ops.hard_attention`."""

from typing import Any

import torch
from torch import Tensor

from fastbert.backends.attention import check_sequences, heads_together, shared
from fastbert.backends.native import address, launcher


def hard_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens = heads_together(q), heads_together(k), heads_together(v), cu_seqlens.contiguous()
    out = q.new_empty(q.shape)
    best, lse = (q.new_empty(q.shape[:2], dtype=dtype) for dtype in (torch.int32, torch.float32))
    if not q.is_cpu:
        check_sequences(cu_seqlens, max_seqlen, q.shape[0])
    module, launch = launcher(q)
    numbers = _shared(q, k, v, cu_seqlens, launch, max_seqlen, *options)
    bad = module.hard_attention_forward(*numbers, out.data_ptr(), best.data_ptr(), lse.data_ptr())
    if bad >= 0:
        check_sequences(cu_seqlens, max_seqlen, q.shape[0])
    return out, best, lse


def hard_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, best: Tensor, lse: Tensor, cu_seqlens: Tensor, *options: Any
) -> Tensor:
    q, k, v, cu_seqlens = heads_together(q), heads_together(k), heads_together(v), cu_seqlens.contiguous()
    dout = dout.contiguous()
    tokens, heads, head_size = q.shape
    dqkv = q.new_empty(tokens, 3, heads, head_size)
    module, launch = launcher(q)
    floats = module.hard_attention_scratch(tokens, heads)
    scratch = q.new_empty(floats, dtype=torch.float32) if floats else None
    numbers = _shared(q, k, v, cu_seqlens, launch, *options)
    module.hard_attention_backward(
        *numbers, dout.data_ptr(), best.data_ptr(), lse.data_ptr(), dqkv.data_ptr(), address(scratch)
    )
    return dqkv


def _shared(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, launch: int, max_seqlen: int, scale: float,
    temperature: float, seed: Tensor | None, *visible: Any,
) -> tuple:  # fmt: skip
    """What both directions take: the struct `Attention`, where nothing is dropped, and the temperature."""
    return *shared(q, k, v, cu_seqlens, launch, max_seqlen, scale, 0, seed, *visible), temperature
