"""LazyAdam's steps by a plan: made of a step's checked arguments, followed as long as everything is where it was.

The C++ module keeps addresses. What lies there can change between two steps: state is loaded or replaced, `param.data`
is another tensor after `module.to()`, a gradient comes in another layout. So each step looks at the tensors again,
which costs a tenth of making its arguments, and a plan that no longer fits is made anew. It keeps no state alive.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.backends import native
from fastbert.backends.lazy_adam import Plan, readable
from fastbert.ops.lazy_adam import GRAD_BY_ROW, SKIP_ZERO, Step, check_rows, update
from fastbert.optim.gradients import Gradient
from fastbert.optim.options import Formula, check_memory
from fastbert.optim.state import TABLES, State


def arguments_of(
    number: int,
    param: Tensor,
    state: State,
    gradient: Gradient,
    group: dict[str, Any],
    formula: Formula,
    padding_idx: int,
) -> Step:
    """All that a step of one parameter takes; its state's count is yet to be raised."""
    flags, seed = formula.flags, None
    if gradient.by_row:
        flags += GRAD_BY_ROW
    elif gradient.rows is None and group["lazy"] == "nonzero":
        flags += SKIP_ZERO
    if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
        seed = torch.tensor([group["seed"]], device=param.device)
    if not param.is_contiguous():
        check_memory(param)
    return Step(
        param=param.contiguous(),
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        max_exp_avg_sq=state["max_exp_avg_sq"] if group["amsgrad"] else None,
        row_steps=state["row_steps"] if group["bias_correction"] == "row" and param.dim() else None,
        rows=gradient.rows,
        grad=gradient.values,
        lr=formula.lr,
        step=state["step"],
        seed=seed,
        beta1=formula.beta1,
        beta2=formula.beta2,
        eps=formula.eps,
        weight_decay=formula.weight_decay,
        flags=flags,
        padding_idx=padding_idx,
        number=number,
    )


def step_by_arguments(listed: list[tuple[Tensor, Step]], backend: str) -> None:
    """The steps of parameters that have no plan, each with its arguments."""
    counts: dict[torch.device, list[Tensor]] = {}
    for _, s in listed:
        counts.setdefault(s.step.device, []).append(s.step)
    for device, its in counts.items():  # a number in place of the tensor takes three times as long
        torch._foreach_add_(its, torch.ones((), device=device), alpha=1.0)
    update([s for _, s in listed], backend)
    for param, s in listed:
        if s.param is not param:
            param.copy_(s.param)


KEPT = ("step", *TABLES)  # of a parameter's state what is tensors of fixed place


class _Made(NamedTuple):
    """What a parameter's plan was made of."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    tables: list[tuple[str, weakref.ref[Tensor], int]]  # of state: name, tensor and its address
    has_rows: bool
    by_row: bool
    grad_dtype: torch.dtype
    grad_shape: torch.Size  # of a gradient that holds its rows, without their number
    seed: Tensor | None


class Plans:
    """Of one optimizer's parameters, by their number in it.

    A step begins with `begin`, takes along every parameter with a gradient, by its plan or by a new one, and is done by
    `finish`. Only that changes anything.
    """

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self._module: Plan | None = None  # made with the first plan
        self.begin(0)

    def begin(self, parameters: int) -> None:
        self._gradients: list[int | tuple[int, ...] | None] = [None] * parameters
        self._changed: list[Tensor] = []
        self._read: list[
            tuple[Tensor, Tensor | None, Tensor, Tensor | None]
        ] = []  # what the kernels read lives so long

    def take(self, number: int, param: Tensor, state: State, gradient: Gradient) -> bool:
        """Takes the parameter along by its plan; False where it has none that is for these tensors."""
        made = self._made.get(number)
        if made is None:
            return False
        address, dtype, shape, tables, has_rows, by_row, grad_dtype, grad_shape, _ = made
        rows, grad, is_by_row = gradient
        if param.data_ptr() != address or param.shape != shape or param.dtype is not dtype or not param.is_contiguous():
            return False
        found = [param]
        for name, same, address in tables:
            x = state.get(name)
            if x is None or x is not same() or x.data_ptr() != address:
                return False
            found.append(x)
        if (rows is not None) is not has_rows or is_by_row is not by_row or grad.dtype is not grad_dtype:
            return False
        if has_rows and not by_row:
            grad_shape = (rows.numel(), *grad_shape)
        if grad.shape != grad_shape or not grad.is_cpu:
            return False
        self._changed += found
        if not has_rows and grad.is_contiguous() and not grad.is_neg():
            self._gradients[number] = grad.data_ptr()
        else:
            ids, grad, scratch = readable(rows, grad)
            self._read.append((param, ids, grad, scratch))
            its = grad.data_ptr()
            self._gradients[number] = (its, ids.data_ptr(), ids.numel(), scratch.data_ptr()) if has_rows else its
        return True

    def make(self, number: int, s: Step, param: Tensor, state: State, gradient: Gradient) -> bool:
        """Plans the parameter's steps, of which `s` is the next, and takes it along.

        False where it can have no plan, because a tensor has to be copied for the module at every step.
        """
        self._made.pop(number, None)
        if s.param is not param or s.grad.dtype not in native.DTYPES or not s.lr.is_cpu:
            return False
        if s.step.dtype != torch.float32 or not s.step.is_cpu or s.step.numel() != 1:
            return False
        rows, grad, by_row = gradient
        self._made[number] = _Made(
            param.data_ptr(), param.dtype, param.shape,
            [(name, weakref.ref(state[name]), state[name].data_ptr()) for name in KEPT if name in state],
            rows is not None, by_row, grad.dtype, grad.shape if rows is None or by_row else grad.shape[1:], s.seed,
        )  # fmt: skip
        if self._module is None:
            self._module = Plan()
        self._module.set(number, s)
        return self.take(number, param, state, gradient)

    def finish(self, groups: list[tuple[int, Formula]]) -> None:
        """Does the step. `groups` are all of the optimizer's: the number of their parameters, and their formulas.

        Raises ValueError where an id lies outside its table; then nothing was changed.
        """
        if not self._changed:
            return
        formulas = [(count, f.lr.data_ptr(), f.beta1, f.beta2, f.eps, f.weight_decay) for count, f in groups]
        if not self._module.step(self._gradients, formulas):
            for param, ids, *_ in self._read:
                if ids is not None:
                    check_rows(ids, param.shape[0])
        torch.autograd.graph.increment_version(self._changed)
        self.begin(0)
