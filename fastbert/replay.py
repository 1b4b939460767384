"""`missed="replay"`: what LazyAdam keeps of past steps, so that a row can be brought to where dense AdamW has it.

Per parameter: `last_step`, the step each row stands at; `history`, learning rate and weight decay of the steps since;
how many of its columns are `recorded`, and `recorded_with` which betas, eps and flags. A row is brought before it is
read, and all are before the history is full or an option changes.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastbert.backend import requested
from fastbert.ops.lazy_adam import EPS_UNCORRECTED, NO_BIAS_CORRECTION
from fastbert.ops.lazy_adam_replay import lazy_adam_replay

STEPS = 4096  # of history; then all rows are brought, which costs one dense step
FLAGS = EPS_UNCORRECTED | NO_BIAS_CORRECTION  # those that say how a step without a gradient moves a row

State = dict[str, Any]


def begin(param: Tensor, state: State) -> None:
    """From here on rows may stay behind; now they all stand at the last step."""
    state["last_step"] = torch.full(param.shape[:1], int(state["step"]), dtype=torch.int32, device=param.device)
    state["history"] = torch.zeros(2, STEPS, dtype=torch.float64, device="cpu")
    state["recorded"] = 0
    state["recorded_with"] = ()


def record(param: Tensor, state: State, lr: float, decay: float, options: tuple, padding_idx: int) -> None:
    """Notes the step that is about to be done. `options`: beta1, beta2, eps, flags."""
    if state["recorded"] == STEPS or state["recorded_with"] != options:
        catch_up(param, state, None, padding_idx)
        state["recorded"], state["recorded_with"] = 0, options
    state["history"][:, state["recorded"]] = torch.tensor([lr, decay], dtype=torch.float64, device="cpu")
    state["recorded"] += 1


def note(state: State, rows: Tensor | None) -> None:
    """Notes the rows that the step just done moved; after a dense one all stand at it."""
    if rows is None:
        state["last_step"].fill_(int(state["step"]))
        state["recorded"] = 0
    else:
        state["last_step"].index_fill_(0, rows, int(state["step"]))


def catch_up(param: Tensor, state: State, rows: Tensor | None, padding_idx: int) -> None:
    """Brings rows, int64 [n], or all to the last step; nothing where none can be behind."""
    if not state.get("recorded"):
        return
    lr, decay = state["history"][:, : state["recorded"]]
    lazy_adam_replay(
        param, state["exp_avg"], state["exp_avg_sq"], state["last_step"], rows, lr, decay, int(state["step"]),
        *state["recorded_with"], padding_idx, requested(),
    )  # fmt: skip


def check_current(state: State, rows: Tensor) -> None:
    """Raises where a row was read as it stood before steps that it missed. Rows on a device are not waited for."""
    if "last_step" not in state or rows.device.type != "cpu":
        return
    if (state["last_step"][rows] < int(state["step"])).any():
        raise RuntimeError(
            'with missed="replay" rows must be brought up to date before the forward pass reads them: call '
            "optimizer.attach(embedding) once, or optimizer.catch_up(param, ids) before each forward pass"
        )


def check_rest_is_zero(grad: Tensor, rows: Tensor) -> None:
    """Raises where a row that is not named has a gradient: dropping it is not dense AdamW's trajectory."""
    touched = (grad.flatten(1) != 0).any(1) if grad.dim() > 1 else grad != 0
    if touched.index_fill_(0, rows, False).any():
        raise ValueError(
            'missed="replay" follows dense AdamW, but rows that are not named have a gradient, as of a tied embedding: '
            'leave rows out (a dense step), or take missed="leave"'
        )


class Hook:
    """On an embedding's forward pass and state_dict: brings the rows that are about to be read."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (optimizer := self.optimizer()) is not None:
            optimizer.catch_up(module.weight, args[0] if args else kwargs["input"])

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if (optimizer := self.optimizer()) is not None and not optimizer.is_raw:
            optimizer.catch_up(module.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": _no_optimizer}  # a copy of the module has parameters of its own


def _no_optimizer() -> None:
    return None
