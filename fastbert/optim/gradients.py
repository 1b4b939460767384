"""What a gradient touches: its rows, its norm and its clipping."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.backends import pick, requested, triton
from fastbert.backends.gradient_norm import gradient_norm
from fastbert.backends.native import DTYPES
from fastbert.ops.lazy_adam import check_rows, sum_duplicates
from fastbert.optim.shards import is_shard, local, rows_here, total_square

norm_in_triton = triton.function("gradient_norm", "gradient_norm")

Rows = Mapping[Tensor, Tensor]  # parameter -> ids of its touched rows


class Gradient(NamedTuple):
    """A parameter's gradient as an optimizer applies it."""

    rows: Tensor | None  # int64 [n]; None: every row
    values: Tensor  # [n, ...], or param's shape: without rows or by row
    by_row: bool


def read(param: Tensor, rows: Rows) -> Gradient | None:
    """The parameter's gradient and the rows it is for, checked; None where there is none. See `LazyAdam.step`.

    Of a parameter that is split over processes those of this process's part.
    """
    grad = param.grad
    if grad is None:
        return None
    if is_shard(param):
        if not is_shard(grad) or grad.placements != param.placements:
            raise TypeError(
                f"the gradient of a parameter that is split must be split alike: expected {param.placements}, got "
                f"{getattr(grad, 'placements', 'a whole one')}"
            )
        ids = rows_here(param, row_ids(rows[param], param)) if rows and param in rows else None
        return Gradient(ids, grad.to_local(), ids is not None)
    if grad.layout is torch.strided:
        if rows and param in rows:
            return Gradient(row_ids(rows[param], param), grad, True)
        return Gradient(None, grad, False)
    if grad.layout is not torch.sparse_coo:
        raise TypeError(f"a gradient must be dense or sparse COO, got {grad.layout}")
    if param in rows:
        raise ValueError(
            "rows name the rows of a dense gradient; this parameter's is sparse and holds them itself: leave it "
            "out of rows, or make the gradient dense (nn.Embedding(sparse=False))"
        )
    if grad.sparse_dim() != 1:
        raise ValueError(f"a sparse gradient must have 1 sparse axis, the rows, got {grad.sparse_dim()}")
    ids = grad._indices()[0]
    check_rows(ids, param.shape[0])
    return Gradient(ids, grad._values(), False)


def row_ids(ids: Tensor, param: Tensor) -> Tensor:
    """ids of any shape and integer type as int64 [n] on the parameter's device, checked to be rows of it."""
    check_integers(ids)
    if param.dim() == 0:
        raise ValueError("a parameter without dimensions has no rows to name")
    rows = ids.reshape(-1).to(param.device, torch.int64)
    check_rows(rows, param.shape[0])
    return rows


def check_integers(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"rows must be an integer tensor of row ids, got {getattr(ids, 'dtype', type(ids))}")


def check_named(rows: Rows, params: set[Tensor], whose: str) -> None:
    """Raises unless `rows` is a mapping whose keys are all among `params`."""
    if not isinstance(rows, Mapping):
        raise TypeError(f"rows must be a dict of parameters and their row ids, {{param: ids}}, got {type(rows)}")
    for param in rows:
        if param not in params:
            raise ValueError(
                f"rows name a tensor of shape {list(getattr(param, 'shape', []))} that is not {whose}: the keys must "
                "be the parameters themselves"
            )


def total_norm(parameters: Iterable[Tensor], rows: Rows | None = None, error_if_nonfinite: bool = False) -> Tensor:
    """The L2 norm of all gradients together as they will be applied; see `clip_grad_norm_`, which has the arguments."""
    return norm_and_factor(parameters, math.inf, rows, error_if_nonfinite)[0]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    rows: Rows | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales gradients so that their common L2 norm is at most `max_norm`; the norm is over what will be applied.

    As `torch.nn.utils.clip_grad_norm_` for that norm, with two differences: sparse gradients count with their
    duplicates added up first, and of a dense gradient with named rows these rows alone count and are scaled, as
    `LazyAdam.step(rows=rows)` will apply them; the others are left as they are. Does not depend on the number of
    threads.

    Args:
        parameters: parameters; those whose `grad` is None are left out.
        max_norm: the largest norm allowed.
        rows: the same ids that `LazyAdam.step` will be given.
        error_if_nonfinite: raise where the norm is NaN or infinite, which waits for the device; otherwise such a norm
            makes gradients NaN or 0, as in torch.

    Returns:
        The norm before scaling, a float32 scalar (float64 where a gradient is float64).

    Dense gradients are scaled in place. A sparse gradient is replaced, because its values may be the very tensor that
    an earlier layer's backward is still to read.

    Raises:
        ValueError: max_norm is negative or NaN, or as in `LazyAdam.step`.
        TypeError: max_norm is no number, or as in `LazyAdam.step`.
        RuntimeError: `error_if_nonfinite` and the norm is not finite; gradients are as they were.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(dict.fromkeys(parameters))
    with torch.no_grad():
        gradients = _read_all(params, rows)
        total, factor, applied = _measured(gradients, max_norm, error_if_nonfinite)
        if factor.is_cpu and factor == 1:
            return total
        for (param, gradient), its in zip(gradients, applied, strict=True):
            _scale(param, gradient, its, factor.to(param.device))
        return total


def norm_and_factor(
    parameters: Iterable[Tensor], max_norm: float, rows: Rows | None = None, error_if_nonfinite: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, and what `clip_grad_norm_`, which has the arguments, would multiply them by."""
    with torch.no_grad():
        gradients = _read_all(list(dict.fromkeys(parameters)), rows)
        return _measured(gradients, max_norm, error_if_nonfinite)[:2]


def _shares_memory(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def sparse(param: Tensor, indices: Tensor, values: Tensor, is_coalesced: bool) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, param.shape, check_invariants=False, is_coalesced=is_coalesced)


def _read_all(params: list[Tensor], rows: Rows | None) -> list[tuple[Tensor, Gradient]]:
    rows = {} if rows is None else rows
    check_named(rows, set(params), "among the parameters given")
    return [(param, gradient) for param in params if (gradient := read(param, rows)) is not None]


class Applied(NamedTuple):
    """What counts of a gradient, for its norm."""

    values: Tensor
    ids: Tensor | None = None  # of the rows in `values`, each once; None: all rows
    named: Tensor | None = None  # uint8 [V]: rows of `values` where it is 0 do not count; None: all do


def _measured(
    gradients: list[tuple[Tensor, Gradient]], max_norm: float, error_if_nonfinite: bool
) -> tuple[Tensor, Tensor, list[Applied]]:
    """The common norm, what gradients are to be multiplied by, and what counts of each."""
    if not isinstance(max_norm, (Real, Tensor)):
        raise TypeError(f"max_norm must be a number >= 0, got {max_norm!r}")
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm}")
    if not gradients:
        return torch.zeros(()), torch.ones(()), []
    backend = _backend_of_norm([gradient.values for _, gradient in gradients])
    are_split = any(is_shard(param) for param, _ in gradients)
    by_kernels = backend in ("cuda", "triton") and not are_split
    applied = [_applied(gradient, by_kernels) for _, gradient in gradients]
    if by_kernels:
        norm = gradient_norm if backend == "cuda" else norm_in_triton
        total, factor = norm([(its.values, its.named) for its in applied], float(max_norm))
    else:
        norms = [_norm(its.values) for its in applied]
        dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
        norms = [norm.to(norms[0].device, torch.float64) for norm in norms]
        if are_split:
            total = total_square([param for param, _ in gradients], norms).sqrt().to(dtype)
        else:
            total = torch.linalg.vector_norm(torch.stack(norms)).to(dtype)
        factor = (max_norm / (total.double() + 1e-6)).clamp(max=1.0)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of the gradients is {total.item()}: skip this step or pass error_if_nonfinite=False"
        )
    return total, factor, applied


def _backend_of_norm(values: list[Tensor]) -> str:
    """The backend that computes their norm; those for GPUs take all of them in one call."""
    device = values[0].device
    fit = all(x.device == device and x.dtype in DTYPES for x in values)
    return pick("lazy_adam", requested(), values[0]) if fit else "reference"


def _applied(gradient: Gradient, by_kernels: bool) -> Applied:
    """After duplicates have been added up or, by row, dropped; where kernels can, without waiting for the device."""
    rows, values, by_row = gradient
    if rows is None:
        return Applied(values)
    if not by_row:
        ids, sums = sum_duplicates(rows, values)
        return Applied(sums, ids)
    if by_kernels:
        return Applied(values, named=named_rows(rows, len(values)))
    ids = rows.unique()
    return Applied(values[ids], ids)


def named_rows(rows: Tensor, table_rows: int) -> Tensor:
    """uint8 [V], 1 where a row is named. An id outside the table is left to the step, which says so."""
    places = rows.where((rows >= 0) & (rows < table_rows), table_rows)
    named = torch.zeros(table_rows + 1, dtype=torch.uint8, device=rows.device)
    return named.index_fill_(0, places, 1)[:table_rows]


def _scale(param: Tensor, gradient: Gradient, its: Applied, factor: Tensor) -> None:
    """Multiplies what counts of `param.grad`."""
    grad = local(param.grad)
    if gradient.rows is None:
        # not in place where elements share memory, as of an expanded gradient
        if _shares_memory(grad):
            param.grad = grad * factor
        else:
            grad.mul_(factor)
    elif its.named is not None:
        factors = torch.where(its.named.bool(), factor, 1.0)
        grad.mul_(factors.view(-1, *(1 for _ in param.shape[1:])))
    elif gradient.by_row:
        grad.index_copy_(0, its.ids, its.values * factor)
    else:
        param.grad = sparse(param, grad._indices(), gradient.values * factor, grad.is_coalesced())


def _norm(x: Tensor) -> Tensor:
    """L2 norm of all elements, in float32 or float64. In fixed blocks: one block is never split between threads."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.reshape(-1)
    while x.numel() > 4096:
        end = x.numel() // 4096 * 4096
        blocks = torch.linalg.vector_norm(x[:end].view(-1, 4096), dim=1, dtype=dtype)
        x = torch.cat([blocks, torch.linalg.vector_norm(x[end:], dtype=dtype).view(1)])
    return torch.linalg.vector_norm(x, dtype=dtype)
