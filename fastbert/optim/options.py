"""LazyAdam's options: what each may be, what goes together, and what a step makes of them."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backends.lazy_adam import number_on
from fastbert.ops.lazy_adam import COUPLED_DECAY, EPS_UNCORRECTED, MAXIMIZE, NO_BIAS_CORRECTION
from fastbert.ops.lazy_adam_replay import check_betas
from fastbert.optim.shards import check_shard, is_shard, local

DEFAULTS = {  # options that torch.optim.AdamW does not have
    "decoupled_weight_decay": True,
    "lazy": None,
    "padding_idx": None,
    "eps_mode": "adam",
    "bias_correction": "global",
    "missed": "leave",
    "stochastic_rounding": False,
    "seed": 0,
    "exp_avg_dtype": None,
    "row_wise": False,
}


CHOICES = (  # options that a training loop seldom changes: checked again only when one has
    "amsgrad",
    "maximize",
    "capturable",
    "differentiable",
    *DEFAULTS,
)


def name_dtype(options: dict[str, Any]) -> None:
    """Puts its name in a dtype's place: torch.distributed.checkpoint takes no dtype among a group's options."""
    if isinstance(options.get("exp_avg_dtype"), torch.dtype):
        options["exp_avg_dtype"] = str(options["exp_avg_dtype"]).removeprefix("torch.")


def check_options(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for an option of another type, outside its range, or that does not go with others.

    `options` are a parameter group's, all of them; `check_param` looks at its parameters.
    """
    check_numbers(options)
    check_choices(options)


def check_numbers(options: dict[str, Any], *, waits: bool = True) -> None:
    """lr, betas, eps and weight_decay, which schedules change; a number on a device is left out unless `waits`."""
    lr, betas = options["lr"], options["betas"]
    if waits or not isinstance(lr, Tensor) or lr.device.type == "cpu":
        _check_number("lr", lr, math.inf)
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers (beta1, beta2), got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be two floats or two tensors, got {betas}")
    for number, beta in enumerate(betas, 1):
        _check_number(f"beta{number}", beta, 1)
    for name in ("eps", "weight_decay"):
        if isinstance(options[name], Tensor):
            raise TypeError(f"{name} must be a float, got a tensor: pass {name}=float(tensor)")
        _check_number(name, options[name], math.inf)
    if options["missed"] == "replay":
        check_betas(*(float(beta) for beta in betas))
        if options["weight_decay"] and not options["decoupled_weight_decay"]:
            raise ValueError('missed="replay" does not go with coupled weight_decay: it joins m and v')


def _check_number(name: str, value: Any, end: float) -> None:
    """Raises unless `value` is a number in [0, end), or a tensor of one such element."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name} must be a float or a tensor of one element, got {value.dtype} of shape {list(value.shape)}"
            )
    elif not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) < end:
        allowed = "be a finite number >= 0" if end == math.inf else f"lie in [0, {end})"
        raise ValueError(f"{name} must {allowed}, got {value}")


def choices_of(group: dict[str, Any]) -> tuple:
    """What `check_choices` and `check_param` go by: where it is as it was, so is what they say."""
    return (len(group["params"]), *[group[name] for name in CHOICES])


def check_choices(options: dict[str, Any]) -> None:
    for name in (
        *("amsgrad", "maximize", "capturable", "differentiable"),
        *("decoupled_weight_decay", "stochastic_rounding", "row_wise"),
    ):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}")
    if options["differentiable"]:
        raise ValueError("LazyAdam's step is an opaque op without a gradient: differentiable=False")
    for name, allowed in (
        ("lazy", (None, "rows", "nonzero")),
        ("eps_mode", ("adam", "sparse_adam")),
        ("bias_correction", ("global", "row", None)),
        ("missed", ("leave", "replay")),
        ("exp_avg_dtype", (None, "float32", "bfloat16")),
    ):
        if options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")
    if not isinstance(options["seed"], int) or not -(2**63) <= options["seed"] < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, got {options['seed']!r}")
    if options["missed"] == "replay":
        _check_replay(options)


def _check_replay(options: dict[str, Any]) -> None:
    for name, given, why in (
        ("amsgrad=True", options["amsgrad"], "its maximum does not decay while a row waits"),
        ('bias_correction="row"', options["bias_correction"] == "row", "dense AdamW has no counts by row"),
        ('lazy="nonzero"', options["lazy"] == "nonzero", "rows must be known before they are read"),
        ("row_wise=True", options["row_wise"], "dense AdamW has a second moment for every number"),
        ("exp_avg_dtype", options["exp_avg_dtype"] == "bfloat16", "it follows dense AdamW in float32"),
    ):
        if given:
            raise ValueError(f'missed="replay" does not go with {name}: {why}')


def check_param(param: Tensor, options: dict[str, Any]) -> None:
    """Raises where LazyAdam cannot step `param`, or not with its group's options."""
    if not param.is_floating_point() or param.layout != torch.strided:
        raise TypeError(f"LazyAdam takes dense floating parameters, got {param.dtype} with {param.layout}")
    if is_shard(param):
        check_shard(param)
        if options["missed"] == "replay":
            raise ValueError('missed="replay" brings rows of whole tables before they are read, got a DTensor')
    elif type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it stands for other tensors
        raise TypeError(
            f"LazyAdam changes a parameter's memory in place and cannot reach that of a {type(param).__name__}: leave "
            "it to torch.optim.AdamW, or train parameters that are plain tensors"
        )
    check_memory(local(param))
    if options["missed"] == "replay" and param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'missed="replay" follows dense AdamW in float32, got a {param.dtype} parameter')
    if options["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError("stochastic_rounding is for bfloat16 parameters, got torch.float16")
    check_padding_idx(options["padding_idx"], param)


def check_memory(param: Tensor) -> None:
    """Raises where elements share memory, as after `expand`: a step could not give each its own value."""
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and param.numel():
            if stride <= reach:
                raise ValueError(
                    f"elements of a parameter must not share memory, as they do after expand(): got shape "
                    f"{list(param.shape)} with strides {list(param.stride())}; pass parameter.contiguous()"
                )
            reach += stride * (size - 1)


def check_padding_idx(padding_idx: int | None, param: Tensor) -> None:
    """Raises unless it is None or the number of one of `param`'s rows."""
    if padding_idx is None:
        return
    if not isinstance(padding_idx, Integral):
        raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}")
    if not (param.dim() and 0 <= padding_idx < param.shape[0]):
        raise ValueError(
            f"padding_idx must be a row of every parameter of the group, got {padding_idx} for {list(param.shape)}"
        )


def check_touched(options: dict[str, Any], shape: torch.Size, has_rows: bool) -> None:
    """Raises where the options do not allow a gradient for some rows (`has_rows`), or for all, of such a parameter."""
    if not has_rows and options["lazy"] == "rows":
        raise ValueError(
            f'lazy="rows": the dense gradient of a parameter of shape {list(shape)} came without its rows; pass '
            "step(rows={param: ids})"
        )
    is_lazy = has_rows or options["lazy"] == "nonzero"
    if is_lazy and options["weight_decay"] and not options["decoupled_weight_decay"]:
        raise ValueError(
            "an L2 penalty (decoupled_weight_decay=False) gives every row a gradient, and only some step: set "
            "weight_decay=0, or decouple it"
        )


class Formula(NamedTuple):
    """What a group's parameters have in common in one step, as the op takes it."""

    lr: Tensor  # float64, one number, on the device of the group's first parameter
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    flags: int
    given: tuple  # lr, betas, eps and weight_decay that it was made of; () where they can change unseen


def formula_of(group: dict[str, Any], last: Formula | None = None) -> Formula:
    """The group's formula: `last`, that of the step before, where a schedule has replaced no number since.

    A captured CUDA graph has one of its own, so that its learning rate stays in memory whatever comes later.

    Raises as `check_numbers` does.
    """
    lr, betas, eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if last is not None and last.given and last.lr.device == device and not is_captured:
        lr0, betas0, eps0, weight_decay0 = last.given
        if lr is lr0 and betas is betas0 and eps is eps0 and weight_decay is weight_decay0:
            return last
    check_numbers(group, waits=False)
    is_fixed = isinstance(betas, tuple) and not is_captured and not any(isinstance(x, Tensor) for x in (lr, *betas))
    flags = (group["eps_mode"] == "sparse_adam") * EPS_UNCORRECTED
    flags += (group["bias_correction"] is None) * NO_BIAS_CORRECTION
    flags += bool(group["maximize"]) * MAXIMIZE
    flags += (not group["decoupled_weight_decay"]) * COUPLED_DECAY
    return Formula(
        number_on(lr, device),
        float(betas[0]), float(betas[1]), float(eps), float(weight_decay), flags,
        (lr, betas, eps, weight_decay) if is_fixed else (),
    )  # fmt: skip


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay; biases and LayerNorm, all that has one axis, without."""
    params = list(model.parameters())
    matrices = [param for param in params if param.dim() > 1]
    vectors = [param for param in params if param.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
