"""LazyAdam's state of a parameter: what its options need, made, and checked where it comes from a file.

State is a dict under torch's names: `step`; the moments `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`; `row_steps` for
`bias_correction="row"`; for `missed="replay"` what `optim/replay.py` keeps. Which of them there are follows from the
options alone, so that what a fresh optimizer holds has a place for everything a checkpoint has.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.lazy_adam import row_wise_shape
from fastbert.optim import replay
from fastbert.optim.gradients import Gradient
from fastbert.optim.options import check_options, check_param, name_dtype
from fastbert.optim.shards import is_shard, local

State = dict[str, Any]
Group = dict[str, Any]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TABLES = (*MOMENTS, "row_steps", "last_step")
NAMES = ("step", *MOMENTS, "row_steps", *replay.NAMES)


def complete(state: State, param: Tensor, group: Group) -> State:
    """`state` with what the group's options need besides, as before a first step; `state` itself lacking nothing.

    Nothing is changed in place.
    """
    missing = [name for name in _needed(param, group) if name not in state]
    if not missing:
        return state
    state = dict(state)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=_device_of_step(param, group))
    for name in missing:
        if name in MOMENTS:
            shape, dtype = shape_and_dtype(name, param, group)
            state[name] = torch.zeros(shape, dtype=dtype, device=param.device)
        elif name == "row_steps":  # rows that stepped before stand at the parameter's count
            state[name] = state["step"].to(param.device, torch.int32).expand(param.shape[:1]).contiguous()
        elif name == "last_step":
            state.update(replay.begin(param, int(state["step"])))
    return state


def _device_of_step(param: Tensor, group: Group) -> torch.device | str:
    """On a GPU kernels count steps themselves, so that a captured graph counts too."""
    return param.device if group["capturable"] or param.is_cuda else "cpu"


def _needed(param: Tensor, group: Group) -> list[str]:
    names = ["step", "exp_avg", "exp_avg_sq"]
    if group["amsgrad"]:
        names.append("max_exp_avg_sq")
    if param.dim() and group["bias_correction"] == "row":
        names.append("row_steps")
    if param.dim() and group["missed"] == "replay":
        names.append("last_step")  # and the others of replay.NAMES with it
    return names


def shape_and_dtype(name: str, param: Tensor, group: Group) -> tuple[tuple[int, ...], torch.dtype]:
    """Of one of `TABLES`."""
    if name in ("row_steps", "last_step"):
        return tuple(param.shape[:1]), torch.int32
    dtype = torch.promote_types(param.dtype, torch.float32)
    if name == "exp_avg":
        return tuple(param.shape), getattr(torch, group["exp_avg_dtype"]) if group["exp_avg_dtype"] else dtype
    return row_wise_shape(param) if group["row_wise"] else tuple(param.shape), dtype


def is_asked_for(groups: list[Group], gradients: list[Gradient]) -> bool:
    """Whether a first step can move nothing: learning rates of 0, and gradients of zero for all parameters.

    With such a step `torch.distributed.checkpoint` has an optimizer make its state. A learning rate on a device is not
    waited for, and taken for one that moves something.
    """
    for group in groups:
        lr = group["lr"]
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    trained = sum(param.requires_grad for group in groups for param in group["params"])
    return len(gradients) == trained > 0 and all(g.rows is None and not g.values.any() for g in gradients)


def check_kept(state: State, param: Tensor, group: Group) -> None:
    """Raises where options that were changed ask for other moments than there are."""
    for name in MOMENTS:
        if name in state and (tuple(state[name].shape), state[name].dtype) != shape_and_dtype(name, param, group):
            raise ValueError(
                f"exp_avg_dtype and row_wise say how {name} is kept, and steps have been taken otherwise: "
                f"{state[name].dtype} {list(state[name].shape)}; leave them as they were, or build a new optimizer"
            )


# ---- from a state dict -----------------------------------------------------------------------------------------------


def check_saved(state_dict: Mapping[str, Any], groups: list[Group]) -> list[Group]:
    """Raises unless `state_dict` fits an optimizer of these groups.

    Returns:
        Its groups, with the options that they do not name taken from `groups`.

    Raises:
        ValueError: groups or state of another optimizer, another model or other options; state that lacks a part.
        TypeError, ValueError: as `check_options` and `check_param`.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"an optimizer's state dict must have the keys 'state' and 'param_groups', got {list(state_dict)[:5]}: "
                "is it a model's?"
            )
    merged = []
    for number, saved in enumerate(state_dict["param_groups"]):
        _check_kind(saved)
        own = dict(groups[number]) if number < len(groups) else {}  # torch compares the numbers, and says so
        own.pop("param_names", None)
        merged.append({**own, **saved})
        name_dtype(merged[-1])
    strangers = state_dict["state"].keys() - {key for group in merged for key in group["params"]}
    if strangers:
        raise ValueError(f"state of {sorted(map(str, strangers))[:5]} is in the state dict, and no group names them")
    for number, (group, own) in enumerate(zip(merged, groups, strict=False)):
        check_options(group)
        for key, param in zip(group["params"], own["params"], strict=False):
            check_param(param, group)
            if state := state_dict["state"].get(key):
                has_maximum = state_dict["param_groups"][number].get("amsgrad", False)
                _check_saved_state(state, param, group, has_maximum)
    return merged


def _check_kind(group: Group) -> None:
    """Adam's groups and AdamW's have all five; SparseAdam's have neither of the last two. Others have other options."""
    names = group.keys()
    if not {"lr", "betas", "eps"} <= names or ("weight_decay" in names) != ("amsgrad" in names):
        raise ValueError(
            "LazyAdam loads its own state and that of torch.optim.Adam, AdamW and SparseAdam; these groups are of "
            f"another optimizer, with the options {sorted(names - {'params', 'param_names'})}"
        )


def _check_saved_state(state: State, param: Tensor, group: Group, has_maximum: bool) -> None:
    unknown = state.keys() - set(NAMES)
    if unknown:
        raise ValueError(
            f"LazyAdam loads its own state and that of torch.optim.Adam, AdamW and SparseAdam; {sorted(unknown)} is of "
            "another optimizer"
        )
    needed = {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if has_maximum else [])}
    if "last_step" in state:
        needed |= set(replay.NAMES)
    if needed - state.keys():
        raise ValueError(
            f"the saved state of a parameter of shape {list(param.shape)} lacks {sorted(needed - state.keys())}: it is "
            "of another optimizer, or incomplete"
        )
    step = state["step"]
    if (isinstance(step, Tensor) and step.numel() != 1) or not isinstance(step, (Tensor, int, float)):
        raise ValueError(f"step must be one number, and was saved as {_described(step)}")
    if not 0 <= float(step) < math.inf:
        raise ValueError(f"step must be a finite number >= 0, and was saved as {float(step)}")
    for name in TABLES:
        if name in state:
            _check_table(name, state[name], step, param, group)
    if "last_step" in state:
        _check_record(state)


def _check_table(name: str, value: Any, step: Any, param: Tensor, group: Group) -> None:
    shape, dtype = shape_and_dtype(name, param, group)
    if isinstance(value, Tensor) and is_shard(param) != is_shard(value):
        raise ValueError(
            f"{name} of a parameter that is split over processes must be split too, and of a whole one whole: load it "
            "by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    fits = isinstance(value, Tensor) and value.layout == torch.strided and tuple(value.shape) == shape
    if not fits or value.is_floating_point() != dtype.is_floating_point or value.is_complex():
        kind = "floating" if dtype.is_floating_point else "integer"
        raise ValueError(
            f"{name} of a parameter of shape {list(param.shape)} must be a {kind} tensor and must have shape "
            f"{list(shape)}, and was saved with {_described(value)}: the state belongs to another model or to other "
            "options"
        )
    value = local(value)
    if not value.numel() or value.device.type == "meta":
        return
    low, high = (x.item() for x in value.detach().aminmax())
    if name in ("row_steps", "last_step") and not 0 <= low <= high <= float(step):
        raise ValueError(
            f"{name} counts steps of rows, from 0 to the parameter's {float(step):g}, and was saved with {low} to "
            f"{high}"
        )
    if name in ("exp_avg_sq", "max_exp_avg_sq") and low < 0:
        raise ValueError(f"{name} is a mean of squares, never negative, and was saved with {low}")


def _check_record(state: State) -> None:
    history, options, recorded = (state[name] for name in ("history", "recorded_with", "recorded"))
    columns = history.shape[1] if isinstance(history, Tensor) and history.dim() == 2 and len(history) == 2 else -1
    if columns < 0 or not isinstance(options, Tensor) or options.shape != (4,):
        raise ValueError(
            f"history must be a tensor [2, steps] and recorded_with a tensor [4], and were saved as "
            f"{_described(history)} and {_described(options)}"
        )
    most = min(columns, float(state["step"]))
    if not isinstance(recorded, int) or not 0 <= recorded <= most:
        raise ValueError(f"recorded must be an int from 0 to {most:g}, the steps of history, and is {recorded!r}")
    if recorded and not options.isfinite().all():
        raise ValueError(f"recorded_with must be finite: betas, eps and flags, and was saved as {options.tolist()}")


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)


def restored(state: State, param: Tensor, group: Group) -> State:
    """A copy of a loaded state, as `step` keeps it."""
    return {name: _restored(name, value, param, group) for name, value in state.items()}


def in_place(state: State, before: State) -> State:
    """`state` in the memory of `before`, where a captured graph looks; a tensor unlike the one there stays its own."""
    return {name: before[name].copy_(x) if _is_like(x, before.get(name)) else x for name, x in state.items()}


def _is_like(x: Any, other: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(other, Tensor)
    return both and (x.shape, x.dtype, x.device) == (other.shape, other.dtype, other.device)


def _restored(name: str, value: Any, param: Tensor, group: Group) -> Any:
    if name == "step":
        return torch.tensor(float(value), dtype=torch.float32, device=_device_of_step(param, group))
    if name in TABLES:
        dtype = shape_and_dtype(name, param, group)[1]
        return value.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
    return value.to("cpu", torch.float64, copy=True) if isinstance(value, Tensor) else value
