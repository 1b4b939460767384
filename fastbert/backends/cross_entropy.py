"""cross_entropy by the C++ modules; the contract is in `fastbert.ops.cross_entropy`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, launcher


def cross_entropy_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels = logits.contiguous(), labels.contiguous()
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    maximum, total = torch.empty_like(losses), torch.empty_like(losses)
    module, launch = launcher(logits, logits.numel())
    bad = module.cross_entropy_forward(
        logits.data_ptr(), labels.data_ptr(), ignore_index,
        losses.data_ptr(), maximum.data_ptr(), total.data_ptr(), rows, columns, DTYPES[logits.dtype], launch,
    )  # fmt: skip
    if bad >= 0:
        check_labels(labels, columns, ignore_index)
    return losses, maximum, total


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    dlosses, logits, labels = dlosses.contiguous(), logits.contiguous(), labels.contiguous()
    dlogits = torch.empty_like(logits)
    module, launch = launcher(logits, logits.numel())
    module.cross_entropy_backward(
        dlosses.data_ptr(), logits.data_ptr(), labels.data_ptr(), maximum.data_ptr(), total.data_ptr(), ignore_index,
        dlogits.data_ptr(), *logits.shape, DTYPES[logits.dtype], launch,
    )  # fmt: skip
    return dlogits


def check_labels(labels: Tensor, columns: int, ignore_index: int) -> None:
    """Raises unless every label lies in [0, columns) or is ignored. Labels on a device are not waited for."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= columns))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {columns}), or be ignore_index ({ignore_index}) to be left out; got "
            f"{int(labels[place])} in row {place}"
        )
