"""lazy_adam by the C++ modules; the contract is in `fastbert.ops.lazy_adam`."""

from collections.abc import Sequence

import torch

from fastbert.backends.native import DTYPES, address, contiguous, module


def lazy_adam_steps(steps: Sequence[tuple]) -> None:
    arguments, kept = [], []  # tensors made here live until the kernels are done
    for (
        param, exp_avg, exp_avg_sq, max_exp_avg_sq, row_steps, rows, grad, lr, step, seed, beta1, beta2, eps,
        weight_decay, flags, padding_idx, number,
    ) in steps:  # fmt: skip
        table_rows, touched = param.shape[0] if param.dim() else 1, 0
        scratch, grad = None, (grad if grad.dtype in DTYPES else grad.float()).resolve_neg().contiguous()
        if rows is not None:
            touched, rows = rows.numel(), contiguous(rows)
            if touched == 0:
                continue  # its address is null, which the kernel reads as every row
            if touched >= 2**31:
                raise ValueError(f"a step takes fewer than 2**31 gradient rows, got {touched}: split the batch")
            scratch = param.new_empty(module.lazy_adam_scratch(touched), dtype=torch.int32)
        lr, step = torch.as_tensor(lr, dtype=torch.float64, device="cpu"), step.float()
        elements = param.numel()
        arguments.append((
            param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), address(max_exp_avg_sq), address(row_steps),
            address(rows), grad.data_ptr(), lr.data_ptr(), step.data_ptr(), address(seed), beta1, beta2, eps,
            weight_decay, flags, padding_idx, number, address(scratch), table_rows, touched,
            elements // table_rows if table_rows else 0, DTYPES[param.dtype], DTYPES[exp_avg.dtype],
            DTYPES[grad.dtype], exp_avg_sq.numel() != elements,
        ))  # fmt: skip
        kept.append((table_rows, rows, grad, scratch, lr, step))
    bad = module.lazy_adam_steps(arguments, torch.get_num_threads())
    if bad >= 0:
        table_rows, rows, *_ = kept[bad]
        row = int(rows[(rows < 0) | (rows >= table_rows)][0])
        raise ValueError(f"row ids must lie in [0, {table_rows}), got {row}; nothing was changed")
