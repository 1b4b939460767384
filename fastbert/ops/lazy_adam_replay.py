"""Brings rows of a table to where dense AdamW would have moved them while no gradient touched them.

At a step i that a row misses its gradient is zero, and AdamW moves it by momentum and weight decay alone:

    w -= lr_i * decay_i * w,   m *= beta1,   v *= beta2
    w -= lr_i / (1 - beta1^i) * m / (sqrt(v) / sqrt(1 - beta2^i) + eps)

Here the steps missed since a row's last one are made up for at once. The twin walks them; the kernels sum them up (see
`csrc/cpu/lazy_adam_replay.cpp`). Momentum decays faster than the root of v, beta1 < sqrt(beta2), so that after some
hundred steps only weight decay is left.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastbert.backends import lazy_adam_replay as kernels
from fastbert.backends import pick, triton
from fastbert.ops.lazy_adam import EPS_UNCORRECTED, NO_BIAS_CORRECTION

_END = 1e-20  # the twin's walk ends when momentum has become so small a part


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def lazy_adam_replay(
        param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last_step: Tensor, rows: Tensor | None, lr: Tensor,
        decay: Tensor, step: int, beta1: float, beta2: float, eps: float, flags: int, padding_idx: int,
    ) -> int:  # fmt: skip
        """Changes the first four arguments in place.

        Args:
            param: [V, ...] float32 (float64 on the reference backend), contiguous.
            exp_avg, exp_avg_sq: m and v, param's shape and dtype, contiguous.
            last_step: int32 [V], the step each row stands at; becomes `step` where it is brought. None may lie before
                `step - len(lr)`.
            rows: int64 [n], ids of the rows wanted, duplicates allowed; None for all.
            lr, decay: float64 [H] on the CPU, learning rate and weight decay of the last H steps up to `step`.
            step: the step rows are brought to, the last that was done.
            flags: EPS_UNCORRECTED, NO_BIAS_CORRECTION or their sum, of `fastbert.ops.lazy_adam`.
            padding_idx: this row does not move; -1 for none.

        Returns:
            -1, or the position of the first row id (without rows: the row) that cannot be brought: it lies outside the
            table, or stands before the recorded steps. Then nothing was changed.
        """
        if rows is not None and (outside := (rows < 0) | (rows >= param.shape[0])).any():
            return int(outside.nonzero()[0])
        behind = last_step < step
        if rows is not None:
            behind &= torch.zeros_like(behind).index_fill_(0, rows, True)
        ids = behind.nonzero().squeeze(1)
        ids, standing = ids[ids != padding_idx], ids
        since = last_step[ids].long()
        if ids.numel() and int(since.min()) < step - lr.numel():
            row = ids[since.argmin()]
            return int(row) if rows is None else int((rows == row).nonzero()[0])
        last_step[standing] = step
        if ids.numel() == 0:
            return -1
        w, m, v = (x.flatten(1)[ids] if x.dim() > 1 else x[ids].unsqueeze(1) for x in (param, exp_avg, exp_avg_sq))
        lr, decay = lr.to(param.device), decay.to(param.device)
        before = step - lr.numel()
        # sum of log(1 - lr * decay) up to each recorded step
        logs = torch.nn.functional.pad(torch.log1p(-lr * decay).cumsum(0), (1, 0))
        missed = (step - since).unsqueeze(1)
        longest = 1 + math.ceil(math.log(_END) / math.log(beta1 / math.sqrt(beta2))) if beta1 > 0 else 0
        moved = torch.zeros_like(w)
        for j in range(1, min(longest, int(missed.max())) + 1):
            place = (since + j - before).clamp(max=lr.numel())
            i = (since + j).double()
            size = lr[place - 1] * (logs[-1] - logs[place]).exp() * beta1**j
            root = torch.full_like(i, beta2 ** (j / 2))
            if not flags & NO_BIAS_CORRECTION:
                size, correction = size / (1 - beta1**i), (1 - beta2**i).sqrt()
                size, root = (size * correction, root) if flags & EPS_UNCORRECTED else (size, root / correction)
            size = torch.where(since + j <= step, size, 0.0)
            size, root = (x.to(w.dtype).unsqueeze(1) for x in (size, root))
            moved += torch.where(m == 0, 0.0, size * m / (v.sqrt() * root + eps))
        keep = (logs[-1] - logs[since - before]).exp().unsqueeze(1)
        w = w * keep.to(w.dtype) - moved
        m, v = m * (beta1 ** missed.double()).to(m.dtype), v * (beta2 ** missed.double()).to(v.dtype)
        for table, new in ((param, w), (exp_avg, m), (exp_avg_sq, v)):
            table[ids] = new.view(ids.numel(), *table.shape[1:])
        return -1


class in_triton:
    lazy_adam_replay = staticmethod(triton.function("lazy_adam_replay", "lazy_adam_replay"))


functions = {"reference": reference, "cpu": kernels, "cuda": kernels, "triton": in_triton}


def _run(*arguments: Any) -> None:
    """The op: the twin's arguments and a backend's name.

    Raises:
        ValueError: a shape, dtype or flag that does not fit, beta1 >= sqrt(beta2), a row id outside the table, or a row
            that stands before the recorded steps.
        RuntimeError: an explicit backend that cannot run here.
    """
    *arguments, backend = arguments
    param, _, _, last_step, rows, lr, _, step, *_ = arguments
    _check(*arguments)
    bad = functions[pick("lazy_adam", backend, param)].lazy_adam_replay(*arguments)
    if bad < 0:
        return
    row = bad if rows is None else int(rows[bad])
    if not 0 <= row < param.shape[0]:
        raise ValueError(f"row ids must lie in [0, {param.shape[0]}), got {row} at position {bad}; nothing was changed")
    raise ValueError(
        f"last_step must be {step - lr.numel()} or more, as the {lr.numel()} steps up to {step} are recorded; got "
        f"{int(last_step[row])} for row {row}; nothing was changed"
    )


_CHANGED = ("param", "exp_avg", "exp_avg_sq", "last_step")
_schema = torch.library.infer_schema(reference.lazy_adam_replay, mutates_args=_CHANGED)
lazy_adam_replay = torch.library.custom_op(
    "fastbert::lazy_adam_replay",
    _run,
    mutates_args=_CHANGED,
    schema=_schema.replace(") -> SymInt", ", str backend) -> ()"),
)
lazy_adam_replay.register_fake(lambda *_: None)


def check_betas(beta1: float, beta2: float) -> None:
    """Raises unless momentum decays faster than the root of the second moment."""
    if not beta1 < math.sqrt(beta2):
        raise ValueError(
            f"missed steps can be made up for where beta1 < sqrt(beta2), so that their sum ends; got beta1 {beta1} and "
            f"beta2 {beta2}"
        )


def _check(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    rows: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    _: float,
    flags: int,
    *others: int,
) -> None:
    check_betas(beta1, beta2)
    if param.dim() == 0:
        raise ValueError("a parameter without dimensions has no rows")
    for name, x in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != param.dtype or x.shape != param.shape:
            raise ValueError(
                f"missed steps are made up for in float32 (or float64): {name} must have param's shape "
                f"{list(param.shape)} and such a dtype, got {x.dtype} {list(x.shape)}"
            )
    for name, x in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("last_step", last_step)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is changed in place")
    if last_step.dtype != torch.int32 or last_step.shape != param.shape[:1]:
        raise ValueError(f"last_step must be int32 [{param.shape[0]}], got {last_step.dtype} {list(last_step.shape)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows must be int64 [n], got {rows.dtype} {list(rows.shape)}")
    for name, x in (("lr", lr), ("decay", decay)):
        if x.dtype != torch.float64 or x.dim() != 1 or x.numel() > step or x.shape != lr.shape:
            raise ValueError(
                f"{name} must be float64 [H], one for each of the last H <= {step} steps, got {x.dtype} {list(x.shape)}"
            )
    if flags & ~(EPS_UNCORRECTED | NO_BIAS_CORRECTION):
        raise ValueError(f"flags must be EPS_UNCORRECTED, NO_BIAS_CORRECTION or their sum, got {flags}")
