"""How far a student's attention scores are from a teacher's, over packed sequences, with its gradient in one pass.

For queries i and keys j of the same sequence and a head n, with D and E the two models' head sizes:

    e_ijn = q_in . k_jn / sqrt(D) - teacher_q_in . teacher_k_jn / sqrt(E)
    loss = 1 / (N P) sum_n sum_ij e_ijn^2,        P = sum_b S_b^2, the pairs of real tokens
    dq_in = 2 / (N P sqrt(D)) sum_j e_ijn k_jn,   dk_jn = 2 / (N P sqrt(D)) sum_i e_ijn q_in

Scores are those before softmax, as TinyBERT compares them; negative ones take part. q, k are [T, N, D], the teacher's
[T, M, E]. Where N and M differ, and one is G times the other, the mean of the scores of G neighbouring heads is
compared with one head of the other model. It is one product, of these heads' queries and keys end to end:

    1 / G sum_g q_ig . k_jg / sqrt(D) = [q_i1 ... q_iG] . [k_j1 ... k_jG] / (G sqrt(D))

so the model with more heads is taken as one of [T, N / G, G D]; N in the sums above is then the smaller number.

The scores [B, S, S] of one head are in memory at a time, on a GPU of as many heads as have 2**24 of them, and none
after the call: dq and dk are made with the loss, and backward scales them. Scores and sums are float32 (float64 for
float64 inputs).

It is composed of torch's products on every device; there is no kernel of its own.
Source: Jiao et al., "TinyBERT: distilling BERT for natural language understanding" (2020), equation 7.
"""

import math

import torch
from torch import Tensor

from fastbert.backends.attention import check_sequences
from fastbert.ops.attention import Padding, check_packed
from fastbert.ops.checks import as_int, check_tensor
from fastbert.ops.register import once_differentiable

# Scores in memory at a time, of one head at least. On a CPU a single head's stay in the caches. A GPU would wait for
# the launches of so many small products: there heads are computed together up to 64 MiB of scores.
AT_ONCE = {"cpu": 1, "cuda": 1 << 24}


def attention_distillation(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Mean squared difference of two models' attention scores before softmax; see the top of this file.

    Args:
        q, k: [T, N, D], the student's, of one dtype, any that `attention` takes.
        teacher_q, teacher_k: [T, M, E], the teacher's, which take no gradient. N divides M, or M divides N.
        cu_seqlens: int32 [B + 1] on q's device: 0, ..., T, never decreasing.
        max_seqlen: tokens of the longest sequence, or more.

    Returns:
        A float32 number (float64 for float64 inputs); 0 where there is no token.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; numbers of heads of which neither divides the
            other; sequences that do not hold (looked at on the CPU only: elsewhere it would wait for the device).
    """
    check_packed("q", q, cu_seqlens, axes=3)
    for name, x, like in (("k", k, q), ("teacher_q", teacher_q, None), ("teacher_k", teacher_k, teacher_q)):
        check_tensor(name, x)
        if like is not None and (x.shape != like.shape or x.dtype != like.dtype):
            raise ValueError(
                f"{name} must be like its queries, {like.dtype} {list(like.shape)}, got {x.dtype} {list(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if teacher_q.dim() != 3 or len(teacher_q) != len(q):
        raise ValueError(f"teacher_q must have q's tokens, [{len(q)}, heads, head size], got {list(teacher_q.shape)}")
    check_heads(q.shape[1], teacher_q.shape[1])
    max_seqlen = as_int("max_seqlen", max_seqlen)
    check_sequences(cu_seqlens, max_seqlen, q.shape[0])
    return _Loss.apply(q, k, teacher_q.detach(), teacher_k.detach(), cu_seqlens, max_seqlen)


def check_heads(heads: int, teacher_heads: int) -> None:
    """Raises ValueError unless one of the numbers, the student's and the teacher's, is a multiple of the other."""
    fewer, more = sorted((heads, teacher_heads))
    if fewer < 1 or more % fewer:
        raise ValueError(
            f"the student must have a divisor or a multiple of the teacher's {teacher_heads} attention heads, got "
            f"{heads}: the mean of neighbouring heads' scores is compared with one head's"
        )


def loss_and_gradients(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dq, dk), the gradients in the dtype of sums; arguments as `attention_distillation`."""
    layout, shape = Padding(cu_seqlens, max_seqlen, q.shape[0]), q.shape
    heads = min(q.shape[1], teacher_q.shape[1])
    scale, teacher_scale = (heads / x.shape[1] / math.sqrt(x.shape[2]) for x in (q, teacher_q))
    q, k, teacher_q, teacher_k = (x.unflatten(1, (heads, -1)).flatten(2) for x in (q, k, teacher_q, teacher_k))
    lengths = cu_seqlens.diff().to(torch.promote_types(q.dtype, torch.float32))
    share = 1 / (heads * lengths.square().sum().clamp(min=1))
    loss, dq, dk = share.new_zeros(()), [], []
    sequences = cu_seqlens.numel() - 1
    together = max(1, AT_ONCE.get(q.device.type, 1) // max(sequences * max_seqlen**2, 1))
    for first in range(0, heads, together):
        # Zeros stand at padding on both sides, so its scores are 0 in both models and differ by nothing.
        group = (layout.pad(x[:, first : first + together]) for x in (q, k, teacher_q, teacher_k))
        mine, my_keys, theirs, their_keys = (x.flatten(0, 1) for x in group)
        difference = torch.baddbmm(mine @ my_keys.mT, theirs, their_keys.mT, beta=scale, alpha=-teacher_scale)
        loss = loss + difference.square().sum()
        for gradients, x in ((dq, difference @ my_keys), (dk, difference.mT @ mine)):
            gradients.append(layout.unpad(x.unflatten(0, (sequences, min(together, heads - first)))))
    factor = 2 * scale * share
    return loss * share, *(torch.cat(each, 1).view(shape) * factor for each in (dq, dk))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, *others):
        with torch.autocast(q.device.type, enabled=False):
            loss, dq, dk = loss_and_gradients(q, k, *others)
        ctx.dtype = q.dtype
        ctx.save_for_backward(dq, dk)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dq, dk = ctx.saved_tensors
        return (dloss * dq).to(ctx.dtype), (dloss * dk).to(ctx.dtype), None, None, None, None
