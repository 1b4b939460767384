"""attention_distillation by the C++ modules; the contract is in `fastbert.ops.attention_distillation`."""

import math

import torch
from torch import Tensor

from fastbert.backends.attention import check_sequences, heads_together, shared
from fastbert.backends.native import address, launcher


def attention_distillation(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    heads, scale, teacher_scale = compared_heads(q, teacher_q)
    loss, dq, dk = (q.new_empty(shape, dtype=torch.float32) for shape in ((), q.shape, q.shape))
    common = torch.promote_types(q.dtype, teacher_q.dtype)  # the kernels take one dtype; this one loses nothing
    q, k, teacher_q, teacher_k = (_end_to_end(x.to(common), heads) for x in (q, k, teacher_q, teacher_k))
    cu_seqlens = cu_seqlens.contiguous()
    if not q.is_cpu:
        check_sequences(cu_seqlens, max_seqlen, q.shape[0])
    module, launch = launcher(q)
    floats = module.attention_distillation_scratch(q.shape[0], heads)
    scratch = q.new_empty(floats, dtype=torch.float32) if floats else None
    bad = module.attention_distillation(
        *shared(q, k, k, cu_seqlens, launch, max_seqlen, scale, 0, None, False, None), teacher_q.data_ptr(),
        teacher_k.data_ptr(), teacher_scale, teacher_q.stride(0), teacher_k.stride(0), teacher_q.shape[2],
        loss.data_ptr(), dq.data_ptr(), dk.data_ptr(), address(scratch),
    )  # fmt: skip
    if bad >= 0:
        check_sequences(cu_seqlens, max_seqlen, q.shape[0])
    return loss, dq, dk


def compared_heads(q: Tensor, teacher_q: Tensor) -> tuple[int, float, float]:
    """How many heads are compared, the smaller number, and what scales the scores of the student and the teacher."""
    heads = min(q.shape[1], teacher_q.shape[1])
    return heads, *(heads / x.shape[1] / math.sqrt(x.shape[2]) for x in (q, teacher_q))


def _end_to_end(x: Tensor, heads: int) -> Tensor:
    """[T, heads, size]: of the model with more heads, neighbours end to end as one."""
    return heads_together(x).view(x.shape[0], heads, x.shape[1] * x.shape[2] // heads)
