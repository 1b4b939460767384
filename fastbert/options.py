"""LazyAdam's options: what each may be, what goes together, and what a step makes of them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.ops.lazy_adam import COUPLED_DECAY, EPS_UNCORRECTED, MAXIMIZE, NO_BIAS_CORRECTION
from fastbert.ops.lazy_adam_replay import check_betas

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


def check_options(options: dict[str, Any]) -> None:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a float or a tensor of one element, got shape {list(lr.shape)}")
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be a finite number >= 0, got {lr}")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError(f"betas must be two floats or two tensors, got {betas}")
    for number, beta in enumerate(betas, 1):
        if not 0 <= float(beta) < 1:
            raise ValueError(f"beta{number} must lie in [0, 1), got {beta}")
    for name in ("eps", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {options[name]}")
    if options["differentiable"]:
        raise ValueError("LazyAdam's step is an opaque op without a gradient: differentiable=False")
    for name, allowed in (
        ("lazy", (None, "rows", "nonzero")),
        ("eps_mode", ("adam", "sparse_adam")),
        ("bias_correction", ("global", "row", None)),
        ("missed", ("leave", "replay")),
        ("exp_avg_dtype", (None, torch.float32, torch.bfloat16)),
    ):
        if options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")
    if not isinstance(options["seed"], int) or not -(2**63) <= options["seed"] < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, got {options['seed']!r}")
    if options["missed"] == "replay":
        _check_replay(options)


def _check_replay(options: dict[str, Any]) -> None:
    check_betas(*(float(beta) for beta in options["betas"]))
    for name, given, why in (
        ("amsgrad=True", options["amsgrad"], "its maximum does not decay while a row waits"),
        ('bias_correction="row"', options["bias_correction"] == "row", "dense AdamW has no counts by row"),
        ('lazy="nonzero"', options["lazy"] == "nonzero", "rows must be known before they are read"),
        ("row_wise=True", options["row_wise"], "dense AdamW has a second moment for every number"),
        ("exp_avg_dtype", options["exp_avg_dtype"] == torch.bfloat16, "it follows dense AdamW in float32"),
        ("coupled weight_decay", options["weight_decay"] and not options["decoupled_weight_decay"], "it joins m and v"),
    ):
        if given:
            raise ValueError(f'missed="replay" does not go with {name}: {why}')


def check_param(param: Tensor, options: dict[str, Any]) -> None:
    if not param.is_floating_point() or param.layout != torch.strided:
        raise TypeError(f"LazyAdam takes dense floating parameters, got {param.dtype} with {param.layout}")
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it stands for other tensors
        raise TypeError(
            f"LazyAdam changes a parameter's memory in place and cannot reach that of a {type(param).__name__}: leave "
            "it to torch.optim.AdamW, or train unsharded parameters with DistributedDataParallel"
        )
    if options["missed"] == "replay" and param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'missed="replay" follows dense AdamW in float32, got a {param.dtype} parameter')
    if options["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError("stochastic_rounding is for bfloat16 parameters, got torch.float16")
    padding_idx = options["padding_idx"]
    if padding_idx is not None and not (param.dim() and 0 <= padding_idx < param.shape[0]):
        raise ValueError(
            f"padding_idx must be a row of every parameter of the group, got {padding_idx} for {list(param.shape)}"
        )


class Formula(NamedTuple):
    """What a group's parameters have in common in one step, as the op takes it."""

    lr: float | Tensor
    beta1: float
    beta2: float
    flags: int


def formula_of(group: dict[str, Any]) -> Formula:
    lr = group["lr"]  # a schedule may have changed it since it was checked; a device tensor is not waited for
    if (not isinstance(lr, Tensor) or lr.device.type == "cpu") and not math.isfinite(lr):
        raise ValueError(f"lr must be a finite number, got {float(lr)}")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    flags = (group["eps_mode"] == "sparse_adam") * EPS_UNCORRECTED
    flags += (group["bias_correction"] is None) * NO_BIAS_CORRECTION
    flags += bool(group["maximize"]) * MAXIMIZE
    flags += (not group["decoupled_weight_decay"]) * COUPLED_DECAY
    return Formula(lr, beta1, beta2, flags)
