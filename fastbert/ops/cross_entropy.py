"""Softmax cross entropy over a large vocabulary, forward and backward, without a float32 copy of the logits.

    loss = log(sum_j exp(x_j)) - x_label               one a row; 0 where the label is ignore_index
    dx_j = (softmax(x)_j - [j = label]) * dloss        0 in a row that is ignored

A mean or a sum of the losses is taken in the same pass. Backward then has one dloss for all rows, which for a mean it
divides by the number of rows that count, or by 1 where none does.

That pass also counts the rows that are right, those with loss <= log(total): the label's logit is the greatest, to
within the rounding of the loss. Where several logits are the greatest, each of them is right.

logits are [M, V], labels int64 [M]. Backward saves the logits themselves and two numbers a row, `maximum = max_j x_j`
and `total = sum_j exp(x_j - maximum)`: their one logarithm would be rounded to the size of the logits, and the error
would stand in every element of the gradient. Arithmetic is float32 (float64 for float64 logits) whatever the dtype of
the logits; dx has their dtype.

Logits may be the first V columns of a wider tensor, as a vocabulary padded for the matrix products gives them: then
they are not copied, and dx is the first V columns of a tensor as wide, whose other columns are 0.

Source of the one pass: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backends import cross_entropy as kernels
from fastbert.backends import pick, requested
from fastbert.ops.checks import as_int, check_activation, check_tensor, wide
from fastbert.ops.register import differentiated, once_differentiable, register

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean", *, backend: str | None = None
) -> Tensor:
    """Cross entropy of softmax(logits) with one label a row, as `torch.nn.functional.cross_entropy` computes it.

    It differs from torch's in three things: the loss is float32 for 16-bit logits too, a mean over no label at all is 0
    rather than NaN, and a row that is ignored passes no gradient even where it holds NaN. Autocast casts nothing here.

    Args:
        logits: [M, V] float32, bfloat16 or float16 (float64 on the reference backend). A view `wider[:, :V]` of a
            tensor [M, W] is taken as it is where W < V + 128; its gradient is then `dwider[:, :V]` of one [M, W] with
            zeros in the columns from V on, so that products may run over all W columns.
        labels: int64 [M] in [0, V), or `ignore_index` for rows that do not count.
        ignore_index: the label of rows that do not count, any int64.
        reduction: "mean" over the rows that count, "sum", or "none".
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        float32 (float64 for float64 logits): a scalar, or [M] with "none". NaN where a row holds NaN or +inf, or
        nothing but -inf; +inf where only the label's logit is -inf. On a GPU a label outside [0, V) gives NaN, and the
        next call of an op, or `check_device_errors`, raises.

    Raises:
        ValueError: an unknown reduction, a shape or device that does not fit, or, on a CPU, a label outside [0, V).
        TypeError: no tensor, a dtype that is not supported, or an ignore_index that is no int.
        RuntimeError: an explicit backend that cannot run here.
    """
    return cross_entropy_with_hits(logits, labels, ignore_index, reduction, backend=backend)[0]


def cross_entropy_with_hits(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean", *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy`, and how many predictions are right, which the same pass counts.

    Args:
        As of `cross_entropy`.

    Returns:
        The loss as of `cross_entropy`; and [2] in its dtype, without gradient: how many rows are right, which is that
        no logit exceeds their label's by more than the loss is rounded to, and how many rows count. Empty with "none".

    Raises:
        As `cross_entropy` does.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    ignore_index = as_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int64, as the labels are, got {ignore_index}")
    check_activation("cross_entropy", "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [M, V], got shape {list(logits.shape)}: flatten the leading axes")
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape {list(logits.shape[:1])}, one a row, got {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {labels.device}")
    chosen = pick("cross_entropy", requested(backend), logits)
    if differentiated(logits):
        return _CrossEntropy.apply(logits, labels, ignore_index, reduction, chosen)
    losses, _, _, result, _, hits = functions[chosen].cross_entropy_forward(logits, labels, ignore_index, reduction)
    return losses if reduction == "none" else result, hits


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def cross_entropy_forward(
        logits: Tensor, labels: Tensor, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Losses, maximum and total [M], then two scalars: mean or sum, and the number of rows that count, at least 1;
        then [2], how many rows are right and how many count, 0 or more.

        With "none" these three are empty.
        """
        if not torch.compiler.is_compiling():
            kernels.check_labels(labels, logits.shape[1], ignore_index)
        x, counted = wide(logits), labels != ignore_index
        maximum = x.amax(-1)
        total = (x - maximum.unsqueeze(-1)).exp().sum(-1)
        picked = x.gather(-1, torch.where(counted, labels, 0).unsqueeze(-1)).squeeze(-1)
        losses = total.log() + (maximum - picked)
        losses, maximum, total = (torch.where(counted, each, 0.0) for each in (losses, maximum, total))
        if reduction == "none":
            return losses, maximum, total, *kernels.empty_results(losses, reduction)
        hits = torch.stack([losses <= total.log(), counted]).sum(1).to(losses.dtype)  # log(0) is -inf
        count = hits[1].clamp(min=1)
        return losses, maximum, total, losses.sum() / (count if reduction == "mean" else 1), count, hits

    @staticmethod
    def cross_entropy_backward(
        dlosses: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, count: Tensor | None,
        ignore_index: int,
    ) -> Tensor:  # fmt: skip
        """`dlosses` [M], or one number for all rows; divided by `count`, if any."""
        counted = labels != ignore_index
        dlosses = (dlosses if count is None else dlosses / count).expand_as(labels)
        share = (wide(logits) - maximum.unsqueeze(-1)).exp() * (dlosses / total).unsqueeze(-1)
        label = torch.where(counted, labels, 0).unsqueeze(-1)
        dlogits = share.scatter_add(-1, label, -dlosses.unsqueeze(-1))
        dlogits = torch.where(counted.unsqueeze(-1), dlogits, 0.0).to(logits.dtype).contiguous()
        columns = logits.shape[1]
        return kernels.first_columns(F.pad(dlogits, (0, kernels.row_stride(logits) - columns)), columns)


def _fake_forward(logits, labels, ignore_index, reduction):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses, maximum, total = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
    return losses, maximum, total, *kernels.empty_results(losses, reduction)


def _fake_backward(dlosses, logits, *_):
    return kernels.first_columns(kernels.empty_gradient(logits), logits.shape[1])


functions = register(
    reference,
    kernels,
    cross_entropy_forward=_fake_forward,
    cross_entropy_backward=_fake_backward,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, reduction, chosen):
        forward = functions[chosen].cross_entropy_forward
        losses, maximum, total, result, count, hits = forward(logits, labels, ignore_index, reduction)
        ctx.save_for_backward(logits, labels, maximum, total, count if reduction == "mean" else None)
        ctx.options = ignore_index, chosen
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)  # for hits there would be zeros
        return losses if reduction == "none" else result, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, dresult, _):
        if dresult is None:
            return (None,) * 5
        ignore_index, chosen = ctx.options
        dlogits = functions[chosen].cross_entropy_backward(dresult, *ctx.saved_tensors, ignore_index)
        return dlogits, None, None, None, None
