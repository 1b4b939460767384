"""lazy_adam by the C++ modules; the contract is in `fastbert.ops.lazy_adam`, whose `Step` holds a step's arguments.

Steps come with all of their arguments, or by a `Plan`, which was told before what does not change.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, address, launcher


def lazy_adam_steps(steps: Sequence[Any]) -> None:
    """Takes `Step`s, checked, of parameters on one device."""
    structs, taken = [], []
    for s in steps:
        rows, grad, scratch = readable(s.rows, s.grad)
        if rows is not None and rows.numel() == 0:
            continue  # its address is null, which the kernel reads as every row
        factor = None if s.grad_factor is None else s.grad_factor.float()
        here = number_on(s.lr, s.param.device), s.step.to(s.param.device, torch.float32)
        taken.append((s._replace(rows=rows, grad=grad, lr=here[0], step=here[1], grad_factor=factor), scratch))
        structs.append(_fields(*taken[-1]))
    if not structs:
        return
    kernels, launch = launcher(taken[0][0].param)
    bad = kernels.lazy_adam_steps(structs, launch)
    if bad >= 0:
        _raise_outside(taken[bad][0].rows, taken[bad][0].param.shape[0])


def number_on(x: float | Tensor, device: torch.device) -> Tensor:
    """A float64 tensor of one number on the device, which is not waited for unless x lies on another one."""
    if isinstance(x, Tensor) and (x.device == device or not x.is_cpu):
        return x.to(device, torch.float64)
    return torch.full((), float(x), dtype=torch.float64, device=device)  # a kernel's argument: no copy to wait for


def readable(rows: Tensor | None, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Ids and gradient as the kernels read them, and the scratch that so many ids need.

    Kernels are given addresses: the three have to live until they are done.
    """
    grad = (grad if grad.dtype in DTYPES else grad.float()).resolve_neg().contiguous()
    if rows is None:
        return None, grad, None
    if rows.numel() >= 2**31:
        raise ValueError(f"a step takes fewer than 2**31 gradient rows, got {rows.numel()}: split the batch")
    kernels, _ = launcher(grad)
    columns = grad.numel() // max(len(grad), 1)
    scratch = grad.new_empty(kernels.lazy_adam_scratch(rows.numel(), columns), dtype=torch.int32)
    return rows.contiguous(), grad, scratch


def _fields(s: Any, scratch: Tensor | None) -> tuple[int | float, ...]:
    """Those of LazyAdamStep in csrc/contract.h."""
    given = [address(x) if x is None or isinstance(x, Tensor) else x for x in s]
    elements, table_rows = s.param.numel(), s.param.shape[0] if s.param.dim() else 1
    return (
        *given, address(scratch), table_rows, 0 if s.rows is None else s.rows.numel(),
        elements // table_rows if table_rows else 0, DTYPES[s.param.dtype], DTYPES[s.exp_avg.dtype],
        DTYPES[s.grad.dtype], s.exp_avg_sq.numel() != elements,
    )  # fmt: skip


def _raise_outside(rows: Tensor, table_rows: int) -> None:
    row = int(rows[(rows < 0) | (rows >= table_rows)][0])
    raise ValueError(f"row ids must lie in [0, {table_rows}), got {row}; nothing was changed")


_DLPACK = getattr(Tensor, "__dlpack_c_exchange_api__", None)
can_plan = _DLPACK is not None


class Plan:
    """Parameters on one device that its module knows from one step to the next, each by its place in the optimizer.

    A step brings gradients, and a group's learning rate, betas, eps and weight decay. It counts itself: it raises the
    number in `Step.step` of all parameters that it moves, and takes the raised number for its own.

    Args:
        names: those that a parameter's state has its tensors under.
        param: a parameter on the device.
    """

    def __init__(self, names: tuple[str, ...], param: Tensor) -> None:
        self._like = param.new_empty(0)
        kernels, _ = launcher(self._like)
        self._structs = kernels.LazyAdamPlan(_DLPACK, names)

    def set(self, place: int, s: Any, param: Tensor, state: dict[str, Any], kind: int) -> None:
        """Plans a parameter's steps, of which `s` is one.

        The plan is for tensors that are as these are and lie where they lie, and for gradients of `s.grad`'s dtype and
        shape: for every row (kind 0), indexed by row with ids (1), or one row for each id (2).
        """
        self._structs.set(place, _fields(s, None), param, state, s.grad, kind)

    def look(self, seen: list[Any], gradients: list[Any], changed: list[Tensor]) -> list[bool | None]:
        """Whether the plans are for these tensors.

        Args:
            seen: place, param, state, grad and kind of one parameter after the other.
            gradients: of each place; gets the address of a gradient of kind 0 that can be read where it is.
            changed: gets the tensors that the step will change.

        Returns:
            For each parameter None: no plan is. True: its gradient is in `gradients`. False: it is yet to be brought.
        """
        return self._structs.look(seen, gradients, changed)

    def step(self, gradients: list[int | tuple[int, ...] | None], groups: list[tuple[int | float, ...]]) -> bool:
        """One step of all parameters that have a gradient.

        Args:
            gradients: of each place None, the address of a gradient for every row, or the addresses of gradient and
                ids, the number of ids, and the address of scratch.
            groups: of each group, in the order of places, the number of its parameters, the address of lr, beta1,
                beta2, eps and weight_decay, and the addresses of grad_factor and found_inf.

        Returns:
            Whether it was done. It was not, and nothing was changed, where an id lies outside its table. On a GPU
            nobody waits to know that; the next call of an op says it.
        """
        _, launch = launcher(self._like)
        with torch.cuda.device(self._like.device) if self._like.is_cuda else contextlib.nullcontext():
            return self._structs.step(gradients, groups, launch) < 0
