"""LazyAdam's steps by a plan: made of a step's checked arguments, followed as long as everything is where it was.

The C++ module keeps addresses. What lies there can change between two steps: state is loaded or replaced, `param.data`
is another tensor after `module.to()`, a gradient comes in another layout. So the module looks at all tensors again
before each step, and a plan that is not for them is made anew. It keeps none of them alive.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import native
from fastbert.backends.lazy_adam import Plan, readable
from fastbert.ops.lazy_adam import GRAD_BY_ROW, SKIP_ZERO, Step, check_rows, update
from fastbert.optim.gradients import Gradient
from fastbert.optim.options import Formula, check_memory
from fastbert.optim.scaling import Scaling
from fastbert.optim.state import TABLES, State

# A parameter that has a gradient: its number, itself, its state, the gradient, its group and the group's formula.
Taken = tuple[int, Tensor, State, Gradient, dict[str, Any], Formula]


def arguments_of(
    number: int,
    param: Tensor,
    state: State,
    gradient: Gradient,
    group: dict[str, Any],
    formula: Formula,
    padding_idx: int,
    scaling: Scaling,
    bf16_copy: Tensor | None,
) -> Step:
    """All that a step of one parameter takes, `scaling` as the op does; its state's count is yet to be raised."""
    flags, seed = formula.flags, None
    if gradient.by_row:
        flags += GRAD_BY_ROW
    elif gradient.rows is None and group["lazy"] == "nonzero":
        flags += SKIP_ZERO
    if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
        seed = torch.full((1,), group["seed"], dtype=torch.int64, device=param.device)  # no copy to wait for
    if not param.is_contiguous():
        check_memory(param)
    return Step(
        param=param.resolve_neg().contiguous(),
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        max_exp_avg_sq=state["max_exp_avg_sq"] if group["amsgrad"] else None,
        row_steps=state["row_steps"] if group["bias_correction"] == "row" and param.dim() else None,
        rows=gradient.rows,
        grad=gradient.values,
        lr=formula.lr.to(param.device),
        step=state["step"],
        seed=seed,
        beta1=formula.beta1,
        beta2=formula.beta2,
        eps=formula.eps,
        weight_decay=formula.weight_decay,
        flags=flags,
        padding_idx=padding_idx,
        number=number,
        grad_factor=scaling.grad_factor,
        found_inf=scaling.found_inf,
        bf16_copy=bf16_copy,
    )


def step_by_arguments(listed: list[tuple[Tensor, Step]], backend: str) -> None:
    """The steps of parameters that have no plan, each with its arguments."""
    counts: dict[torch.device, list[Step]] = {}
    for _, s in listed:
        counts.setdefault(s.step.device, []).append(s)
    for device, its in counts.items():  # a number in place of the tensor takes three times as long
        one, found_inf = torch.ones((), device=device), its[0].found_inf
        if found_inf is not None:
            one = (found_inf == 0).to(one).reshape(())
        torch._foreach_add_([s.step for s in its], one, alpha=1.0)
    update([s for _, s in listed], backend)
    for param, s in listed:
        if s.param is not param:
            param.copy_(s.param)


class Plans:
    """Of one optimizer's parameters, by their number in it: of those on the device of the first that is planned.

    They are for the backend that was asked for when they were made. A step begins by `begin`, takes along parameters
    that have a gradient, by `take` those with a plan and by `make` the others, and is done by `finish`. Only that
    changes anything.
    """

    def __init__(self, backend: str, copies: dict[Tensor, Tensor]) -> None:
        self.backend = backend
        self._copies = copies  # in bfloat16, of some parameters
        self._module: Plan | None = None  # made with the first plan
        self._device: torch.device | None = None  # of all planned parameters
        self._seeds: dict[int, Tensor | None] = {}  # the module has their addresses
        self.begin(0)

    def begin(self, parameters: int) -> None:
        """Forgets a step that was not finished; the optimizer has so many parameters."""
        self._gradients: list[int | tuple[int, ...] | None] = [None] * parameters
        self._changed: list[Tensor] = []
        self._brought: list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]] = []  # the kernels read what is in it

    def take(self, taken: list[Taken]) -> list[bool]:
        """Takes along each parameter, by its number, that has a plan which is for these tensors. Which those are."""
        if self._module is None:
            return [False] * len(taken)
        seen: list[Any] = []
        for number, param, state, gradient, *_ in taken:
            if self._copies:
                state = self._with_copy(param, state)
            seen += (number, param, state, gradient.values, _kind(gradient))
        looked = self._module.look(seen, self._gradients, self._changed)
        return [
            bool(found) or (found is False and self._bring(number, param, gradient))
            for (number, param, _, gradient, *_), found in zip(taken, looked, strict=True)
        ]

    def _with_copy(self, param: Tensor, state: State) -> State:
        """All that a step changes besides the parameter."""
        return {**state, "bf16_copy": self._copies[param]} if param in self._copies else state

    def _bring(self, number: int, param: Tensor, gradient: Gradient) -> bool:
        rows, grad, by_row = gradient
        if rows is not None and not by_row and len(rows) != len(grad):
            return False
        rows, grad, scratch = readable(rows, grad)
        self._brought.append((param, rows, grad, scratch))
        self._gradients[number] = grad.data_ptr()
        if rows is not None:
            self._gradients[number] = grad.data_ptr(), rows.data_ptr(), rows.numel(), scratch.data_ptr()
        return True

    def make(self, number: int, s: Step, param: Tensor, state: State, gradient: Gradient) -> bool:
        """Plans the parameter's steps, of which `s` is the next, and takes it along.

        False where it can have no plan, because a tensor has to be copied for the module at every step, or because it
        lies on another device than those that have one.
        """
        if s.param is not param or s.grad.dtype not in native.DTYPES:
            return False
        if s.step.dtype != torch.float32 or s.step.device != param.device or s.step.numel() != 1:
            return False
        if self._module is None:
            self._module, self._device = Plan(("step", *TABLES, "bf16_copy"), param), param.device
        if param.device != self._device:
            return False
        state = self._with_copy(param, state)
        self._module.set(number, s, param, state, _kind(gradient))
        self._seeds[number] = s.seed
        self._changed += [x for x in (param, *state.values()) if isinstance(x, Tensor)]
        return self._bring(number, param, gradient)

    def finish(self, groups: list[tuple[int, Formula]], scaling: Scaling) -> None:
        """Does the step. `groups` are all of the optimizer's: the number of their parameters, and their formulas.

        Raises ValueError where an id lies outside its table; then nothing was changed.
        """
        if not self._changed:
            return
        scaling = scaling.on(self._changed[0])  # the module's structs have its addresses
        learning_rates = [f.lr.to(self._device) for _, f in groups]  # the very tensors, but for a group elsewhere
        shared = native.address(scaling.grad_factor), native.address(scaling.found_inf)
        formulas = [
            (count, lr.data_ptr(), f.beta1, f.beta2, f.eps, f.weight_decay, *shared)
            for (count, f), lr in zip(groups, learning_rates, strict=True)
        ]
        if not self._module.step(self._gradients, formulas):
            for param, rows, *_ in self._brought:
                if rows is not None:
                    check_rows(rows, param.shape[0])
            raise ValueError(
                "row ids were changed while they were read, to some outside the table: nothing was changed"
            )
        torch.autograd.graph.increment_version(self._changed)
        self.begin(0)


def _kind(gradient: Gradient) -> int:
    return 0 if gradient.rows is None else 1 if gradient.by_row else 2
