"""attention_distillation by the C++ modules; the contract is in `fastbert.ops.attention_distillation`."""

import math

import torch
from torch import Tensor

from fastbert.backends.attention import check_sequences, heads_together
from fastbert.backends.native import DTYPES, address, launcher


def attention_distillation(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    heads, scale, teacher_scale = compared_heads(q, teacher_q)
    tokens, size, teacher_size = q.shape[0], *(x.shape[1] * x.shape[2] // heads for x in (q, teacher_q))
    inputs = q, k, teacher_q, teacher_k = [heads_together(x) for x in (q, k, teacher_q, teacher_k)]
    cu_seqlens = cu_seqlens.contiguous()
    loss, dq, dk = (q.new_empty(shape, dtype=torch.float32) for shape in ((), q.shape, q.shape))
    if not q.is_cpu:
        check_sequences(cu_seqlens, max_seqlen, tokens)
    module, launch = launcher(q)
    scratch = q.new_empty(module.attention_distillation_scratch(tokens, heads), dtype=torch.float32)
    bad = module.attention_distillation(
        *(x.data_ptr() for x in inputs), cu_seqlens.data_ptr(), max_seqlen, scale, teacher_scale,
        *(x.stride(0) for x in inputs), tokens, cu_seqlens.numel() - 1, heads, size, teacher_size, DTYPES[q.dtype],
        DTYPES[teacher_q.dtype], loss.data_ptr(), dq.data_ptr(), dk.data_ptr(), address(scratch), launch,
    )  # fmt: skip
    if bad >= 0:
        check_sequences(cu_seqlens, max_seqlen, tokens)
    return loss, dq, dk


def compared_heads(q: Tensor, teacher_q: Tensor) -> tuple[int, float, float]:
    """How many heads are compared, the smaller number, and what scales the scores of the student and the teacher."""
    heads = min(q.shape[1], teacher_q.shape[1])
    return heads, *(heads / x.shape[1] / math.sqrt(x.shape[2]) for x in (q, teacher_q))
