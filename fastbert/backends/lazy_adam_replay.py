"""lazy_adam_replay by the C++ modules; the contract is in `fastbert.ops.lazy_adam_replay`."""

import torch
from torch import Tensor

from fastbert.backends.native import address, contiguous, launcher


def lazy_adam_replay(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last_step: Tensor, rows: Tensor | None, lr: Tensor,
    decay: Tensor, step: int, beta1: float, beta2: float, eps: float, flags: int, padding_idx: int,
) -> int:  # fmt: skip
    """-1, or the position of the first row id that cannot be brought; then nothing was changed."""
    table_rows, named = param.shape[0], 0 if rows is None else rows.numel()
    columns = param.numel() // max(table_rows, 1)
    if param.numel() == 0 or (rows is not None and named == 0):
        return -1
    rows = contiguous(rows)
    lr, decay = (x.contiguous().to(param.device, non_blocking=True) for x in (lr, decay))
    module, launch = launcher(param, (named or table_rows) * columns)
    scratch = param.new_empty(module.lazy_adam_replay_scratch(lr.numel()), dtype=torch.float64)
    return module.lazy_adam_replay(
        param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), last_step.data_ptr(), address(rows),
        lr.data_ptr(), decay.data_ptr(), step, beta1, beta2, eps, flags, padding_idx,
        scratch.data_ptr(), table_rows, named, columns, lr.numel(), launch,
    )  # fmt: skip
