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

dq and dk are made with the loss, in the dtype of sums, and backward scales them: no scores are kept. Scores and sums
are float32 (float64 for float64 inputs).
Source: Jiao et al., "TinyBERT: distilling BERT for natural language understanding" (2020), equation 7.
"""

import torch
from torch import Tensor

from fastbert.backends import attention_distillation as kernels
from fastbert.backends import pick, requested
from fastbert.backends.attention_distillation import compared_heads
from fastbert.ops.attention import Padding, check_packed
from fastbert.ops.checks import as_int, check_activation, without_autocast
from fastbert.ops.register import differentiated, once_differentiable, register

# Scores that the reference has in memory at a time, of one head at least. On a CPU a single head's stay in the caches.
# A GPU would wait for the launches of so many small products: there heads are computed together up to 64 MiB of scores.
AT_ONCE = {"cpu": 1, "cuda": 1 << 24}


def attention_distillation(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of two models' attention scores before softmax; see the top of this file.

    Args:
        q, k: [T, N, D], the student's, of one dtype, any that `attention` takes; views of one packed projection are
            taken as they are. Autocast changes nothing: scores and sums are float32 in any case.
        teacher_q, teacher_k: [T, M, E], the teacher's, which take no gradient, of one dtype, the student's or another;
            float64 goes with float64 alone. N divides M, or M divides N.
        cu_seqlens: int32 [B + 1] on q's device: 0, ..., T, never decreasing.
        max_seqlen: tokens of the longest sequence, or more.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        A float32 number (float64 for float64 inputs); 0 where there is no token.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; numbers of heads of which neither divides the
            other; sequences that do not hold (looked at on the CPU only: elsewhere it would wait for the device).
        RuntimeError: an explicit backend that cannot run here.
    """
    check_packed("q", q, cu_seqlens, axes=3)
    check_activation("attention_distillation", "teacher_q", teacher_q)
    if teacher_q.dim() != 3 or len(teacher_q) != len(q):
        raise ValueError(f"teacher_q must have q's tokens, [{len(q)}, heads, head size], got {list(teacher_q.shape)}")
    for name, x, like in (("k", k, q), ("teacher_k", teacher_k, teacher_q)):
        check_activation("attention_distillation", name, x)
        if x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(
                f"{name} must be like its queries, {like.dtype} {list(like.shape)}, got {x.dtype} {list(x.shape)}"
            )
    for name, x in (("k", k), ("teacher_q", teacher_q), ("teacher_k", teacher_k)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if (q.dtype == torch.float64) != (teacher_q.dtype == torch.float64):
        raise ValueError(
            f"both models must be float64 or neither, got {q.dtype} for the student's queries and {teacher_q.dtype} "
            "for the teacher's: cast one of them"
        )
    check_heads(q.shape[1], teacher_q.shape[1])
    chosen = pick("attention_distillation", requested(backend), q)
    arguments = q, k, teacher_q.detach(), teacher_k.detach(), cu_seqlens, as_int("max_seqlen", max_seqlen)
    if differentiated(q, k):
        return _AttentionDistillation.apply(chosen, *arguments)
    return functions[chosen].attention_distillation(*arguments)[0]


def check_heads(heads: int, teacher_heads: int) -> None:
    """Raises ValueError unless one of the numbers, the student's and the teacher's, is a multiple of the other."""
    fewer, more = sorted((heads, teacher_heads))
    if fewer < 1 or more % fewer:
        raise ValueError(
            f"the student must have a divisor or a multiple of the teacher's {teacher_heads} attention heads, got "
            f"{heads}: the mean of neighbouring heads' scores is compared with one head's"
        )


class reference:  # a namespace, spelled as a backend is
    """The op in plain PyTorch: any device, and float64. It pads, and holds all scores of a head in memory."""

    @staticmethod
    @without_autocast
    def attention_distillation(
        q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """loss, dq and dk."""
        layout, shape = Padding.checked(cu_seqlens, max_seqlen, q.shape[0]), q.shape
        heads, scale, teacher_scale = compared_heads(q, teacher_q)
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


def _fake(q, *_):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((), dtype=dtype), q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape, dtype=dtype)


functions = register(reference, kernels, attention_distillation=_fake)


class _AttentionDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, q, k, *others):
        loss, dq, dk = functions[chosen].attention_distillation(q, k, *others)
        ctx.dtype = q.dtype
        ctx.save_for_backward(dq, dk, q, k)  # the inputs so that a second derivative finds its way, and is refused
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dq, dk, *_ = ctx.saved_tensors
        return None, (dloss * dq).to(ctx.dtype), (dloss * dk).to(ctx.dtype), *(None,) * 4
