"""`missed="replay"`: what LazyAdam keeps of past steps, so that a row can be brought to where dense AdamW has it.

Per parameter: `last_step`, the step each row stands at; `history`, learning rate and weight decay of the steps since;
how many of its columns are `recorded` (0: no row is behind), and `recorded_with` which betas, eps and flags. A row is
brought before it is read, and all are before the history is full or an option changes. A gradient of a row that was
read without being brought is refused, wherever it can be told: at the step, or when the row is brought afterwards.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastbert.backends import requested
from fastbert.ops.lazy_adam import EPS_UNCORRECTED, NO_BIAS_CORRECTION
from fastbert.ops.lazy_adam_replay import lazy_adam_replay
from fastbert.optim.gradients import Gradient

STEPS = 4096  # of history at most; then all rows are brought, which costs one dense step
FLAGS = EPS_UNCORRECTED | NO_BIAS_CORRECTION  # those that say how a step without a gradient moves a row
NAMES = ("last_step", "history", "recorded", "recorded_with")

State = dict[str, Any]


def begin(param: Tensor, step: int) -> State:
    """What is kept from here on, where all rows stand at the last step. A small parameter has a short history."""
    steps = min(STEPS, max(64, param.numel() // 64))
    return {
        "last_step": torch.full(param.shape[:1], step, dtype=torch.int32, device=param.device),
        "history": torch.zeros(2, steps, dtype=torch.float64, device="cpu"),
        "recorded": 0,
        "recorded_with": torch.zeros(4, dtype=torch.float64, device="cpu"),
    }


def end(param: Tensor, state: State, padding_idx: int) -> None:
    """Brings all rows to the last step and keeps nothing from here on."""
    catch_up(param, state, None, padding_idx)
    for name in NAMES:
        del state[name]


def record(param: Tensor, state: State, lr: float, decay: float, options: tuple, padding_idx: int) -> None:
    """Notes the step by rows that is about to be done. `options`: beta1, beta2, eps, flags."""
    history = state["history"]
    if state["recorded"] == history.shape[1] or state["recorded_with"].tolist() != list(options):
        catch_up(param, state, None, padding_idx)
        state["recorded"], state["recorded_with"] = 0, torch.tensor(options, dtype=torch.float64, device="cpu")
    history[:, state["recorded"]] = torch.tensor([lr, decay], dtype=torch.float64, device="cpu")
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
    beta1, beta2, eps, flags = state["recorded_with"].tolist()
    lazy_adam_replay(
        param, state["exp_avg"], state["exp_avg_sq"], state["last_step"], rows, lr, decay, int(state["step"]),
        beta1, beta2, eps, int(flags), padding_idx, requested(),
    )  # fmt: skip


_REMEDY = (
    "call optimizer.attach(embedding) once and read the table through that module alone, or call "
    "optimizer.catch_up(param, ids) before each forward pass, without ids where it reads the whole table, with "
    "fastbert.all_gather_ids(ids) where processes exchange their rows"
)


def check_gradient(gradient: Gradient, state: State, padding_idx: int) -> None:
    """Raises where a step's gradient is not the one dense AdamW would have had.

    That is: it is for rows that stand before steps they missed (of a dense gradient without named rows: any row, as the
    whole table may have been read), or rows that are not named have one too.
    """
    if gradient.by_row:
        _check_rest_is_zero(gradient.values, gradient.rows)
    if not state.get("recorded"):
        return
    behind = _behind(state, gradient.rows, padding_idx)
    if behind.any():
        raise RuntimeError(
            'with missed="replay" rows must be brought up to date before the forward pass reads them, and this '
            f"gradient is for {int(behind.sum())} that were not: {_REMEDY}"
        )


def check_unread(param: Tensor, state: State, rows: Tensor | None, padding_idx: int) -> None:
    """Raises where a row that is about to be brought has a gradient already, which is of where it stood before."""
    grad = param.grad
    if grad is None or not state.get("recorded"):
        return
    if grad.layout == torch.sparse_coo:
        touched = grad._indices()[0]
        rows = touched if rows is None else touched[torch.isin(touched, rows)]
        behind = _behind(state, rows, padding_idx)
    else:
        behind = _behind(state, rows, padding_idx)
        behind = (grad if rows is None else grad[rows])[behind] != 0
    if behind.any():
        raise RuntimeError(
            'with missed="replay" rows must be brought up to date before the forward pass reads them, and a gradient '
            f"has been computed from rows that were not: call zero_grad(); from then on {_REMEDY}"
        )


def _behind(state: State, rows: Tensor | None, padding_idx: int) -> Tensor:
    """bool [n], or [V] without rows: which stand before the last step. The padding row never moves, so never does."""
    last_step = state["last_step"] if rows is None else state["last_step"][rows]
    behind = last_step < int(state["step"])
    if padding_idx >= 0 and rows is None:
        behind[padding_idx] = False
    elif padding_idx >= 0:
        behind &= rows != padding_idx
    return behind


def _check_rest_is_zero(grad: Tensor, rows: Tensor) -> None:
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

    def before_load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """What is loaded stands at the last step: nothing that the weights before it missed is owed.

        Unless it is the weight itself, into which torch.distributed.checkpoint has loaded in place.
        """
        loaded = state_dict.get(f"{prefix}weight")
        itself = isinstance(loaded, Tensor) and loaded.data_ptr() == module.weight.data_ptr()
        if (optimizer := self.optimizer()) is not None and not optimizer.is_raw and not itself:
            optimizer.catch_up(module.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": _no_optimizer}  # a copy of the module has parameters of its own


def _no_optimizer() -> None:
    return None
