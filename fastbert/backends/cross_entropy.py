"""cross_entropy by the C++ modules; the contract is in `fastbert.ops.cross_entropy`."""

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, launcher

PADDING = 128  # a vocabulary is padded by fewer columns


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    stride = row_stride(logits)
    logits, labels = _rows(logits), labels.contiguous()
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    maximum, total = torch.empty_like(losses), torch.empty_like(losses)
    reduced = empty_results(losses, reduction)
    results = (0, 0, 0) if reduction == "none" else [each.data_ptr() for each in reduced]
    module, launch = launcher(logits, logits.numel())
    bad = module.cross_entropy_forward(
        logits.data_ptr(), labels.data_ptr(), ignore_index, reduction == "mean",
        losses.data_ptr(), maximum.data_ptr(), total.data_ptr(), *results, rows, columns, stride,
        DTYPES[logits.dtype], launch,
    )  # fmt: skip
    if bad >= 0:
        check_labels(labels, columns, ignore_index)
    return losses, maximum, total, *reduced


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, count: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    wider = empty_gradient(logits)
    dlosses, logits, labels = dlosses.contiguous(), _rows(logits), labels.contiguous()
    module, launch = launcher(logits, logits.numel())
    module.cross_entropy_backward(
        dlosses.data_ptr(), dlosses.dim() == 0, logits.data_ptr(), labels.data_ptr(), maximum.data_ptr(),
        total.data_ptr(), address(count), ignore_index, wider.data_ptr(), *logits.shape, wider.shape[1],
        DTYPES[logits.dtype], launch,
    )  # fmt: skip
    return first_columns(wider, logits.shape[1])


def empty_results(losses: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Room for mean or sum, count and hits; for none of them where losses are not reduced."""
    result, count, hits = (losses.new_empty(0 if reduction == "none" else shape) for shape in ((), (), 2))
    return result, count, hits


def row_stride(logits: Tensor) -> int:
    """Elements from row to row as the kernels take logits: as they lie, or V where they must be copied first.

    Rows further apart than padding explains, as of every other row, are copied: the gradient would be as wide.
    """
    columns, (between, within) = logits.shape[1], logits.stride()
    return between if within == 1 and columns <= between < columns + PADDING else columns


def empty_gradient(logits: Tensor) -> Tensor:
    """Room for dlogits and for what lies between its rows: [M, row_stride(logits)]."""
    return logits.new_empty(logits.shape[0], row_stride(logits))


def first_columns(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[1] == columns else x[:, :columns]


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride() == (row_stride(logits), 1) else logits.contiguous()


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
