"""LazyAdam: one optimizer for dense parameters and for tables of which a batch touches a few rows.

The update itself is an op (`fastbert.ops.lazy_adam`); here are state, parameter groups, what counts as touched, and the
gradient norm that goes with it. Everything is checked before anything is changed.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastbert.backend import requested
from fastbert.ops.lazy_adam import GRAD_BY_ROW, MAXIMIZE, check_rows, sum_duplicates, update

Rows = Mapping[Tensor, Tensor]  # parameter -> ids of its touched rows


class LazyAdam(Optimizer):
    """AdamW that moves only the rows a batch touched: weight, both moments and weight decay.

    **`weight_decay` is 0.0 unless given, not AdamW's 0.01.** It is decoupled, as in AdamW, and a row decays when it is
    touched. What a gradient touches:

    - dense: every row, the step of `torch.optim.AdamW`;
    - dense, with `step(rows={param: ids})`: the named rows, the rest of the gradient is ignored;
    - sparse (`nn.Embedding(sparse=True)`): the rows it holds. It is never coalesced; duplicates are added up in
      float32 (float64 for float64), in the order they stand in, whatever the gradient's dtype.

    Untouched rows keep their bits. Bias correction counts the parameter's steps with a gradient, empty ones included,
    as `torch.optim.SparseAdam` counts; a parameter whose `grad` is None is left out, named in `rows` or not. Results do
    not depend on the number of threads.

    Parameters may be float32, bfloat16 or float16 (float64 on the reference backend), of any shape; rows are the first
    axis. State is float32 (float64 for float64) under torch's names `step`, `exp_avg`, `exp_avg_sq` and
    `max_exp_avg_sq`, so that state dicts go to and from `torch.optim.AdamW`; `load_state_dict` copies them and keeps
    float32 for parameters of any dtype. A parameter that is not contiguous is copied there and back at every step.

    Sources: Kingma and Ba, "Adam: a method for stochastic optimization" (2015); Loshchilov and Hutter, "Decoupled
    weight decay regularization" (2019); the lazy form is TensorFlow's LazyAdamOptimizer, with AdamW's eps.

    Args:
        params: parameters, named parameters, or group dicts, as for every torch optimizer.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the bias-corrected second moment, as Adam and AdamW do.
        weight_decay: decoupled, on touched rows.
        amsgrad: divide by the largest second moment so far.
        maximize: step uphill.
        foreach, fused: accepted, without effect.
        capturable, differentiable: must be False.

    Raises:
        ValueError: an option outside its range or not supported.
        TypeError: a parameter that is complex, an integer or sparse itself.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # for torch.optim.Adam, should it load our state
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; its options override the constructor's. Raises as the constructor does."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point() or param.layout != torch.strided:
                self.param_groups.pop()
                raise TypeError(f"LazyAdam takes dense floating parameters, got {param.dtype} with {param.layout}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, rows: Rows | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model anew and returns the loss; runs first, with gradients enabled.
            rows: for parameters with a dense gradient, the ids of the rows that step: any shape, any integer type,
                duplicates count once. A named row with zero gradient takes an ordinary step. Ids on a device other
                than the CPU are not checked here, which would wait for the device.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError: ids outside the table, ids for a parameter that is not this optimizer's or whose gradient is
                sparse, a gradient with more than one sparse axis, a learning rate that is NaN or infinite.
            TypeError: ids that are not an integer tensor, a gradient of another layout than strided or COO.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows = rows or {}
        groups = self.param_groups
        _check_named(rows, {param for group in groups for param in group["params"]}, "this optimizer's")
        rates = [_learning_rate(group["lr"]) for group in groups]
        gradients = [[_gradient(param, rows) for param in group["params"]] for group in groups]
        for group, lr, of_group in zip(groups, rates, gradients, strict=True):
            for param, gradient in zip(group["params"], of_group, strict=True):
                if gradient is not None:
                    self._step_param(param, gradient, lr, group)
        return loss

    def _step_param(self, param: Tensor, gradient: "_Gradient", lr: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
            if name not in state:
                dtype = torch.promote_types(param.dtype, torch.float32)
                state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        step = state["step"]
        step += 1
        table = param.contiguous()
        beta1, beta2 = group["betas"]
        update(
            table, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None, None,
            gradient.rows, gradient.values, lr, step, None, float(beta1), float(beta2), group["eps"],
            group["weight_decay"], gradient.by_row * GRAD_BY_ROW + bool(group["maximize"]) * MAXIMIZE, -1, 0,
            requested(),
        )  # fmt: skip
        if table is not param:
            param.copy_(table)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # options that the optimizer which saved it did not know
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["decoupled_weight_decay"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class, `torch.optim.AdamW` or `Adam` returned; state is copied.

        Raises:
            ValueError: groups or state that do not fit, or options that LazyAdam does not have.
        """
        saved = {}

        # torch casts state to the parameter's dtype while it loads, which would cost float32 moments of bfloat16
        # parameters their bits: the state is read again, after the users' hooks before and before those after.
        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved.update(state_dict)
            for group in saved["param_groups"]:
                options = {**self.defaults, **group}
                _check_options(options)
                if options["weight_decay"] and not options["decoupled_weight_decay"]:
                    raise ValueError(
                        "the saved optimizer had coupled weight decay (torch.optim.Adam with weight_decay > 0); "
                        "LazyAdam's is decoupled: set the saved groups' weight_decay to 0, or load into AdamW first"
                    )
            for key, param in self._by_saved_key(saved["param_groups"]):
                for name, value in saved["state"].get(key, {}).items():
                    if name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") and value.shape != param.shape:
                        raise ValueError(
                            f"{name} of a parameter of shape {list(param.shape)} was saved with shape "
                            f"{list(value.shape)}: the state belongs to another model"
                        )

        def restore(_: Optimizer) -> None:
            for key, param in self._by_saved_key(saved["param_groups"]):
                if key in saved["state"]:
                    self.state[param] = {
                        name: _restored(name, value, param) for name, value in saved["state"][key].items()
                    }

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _by_saved_key(self, saved_groups: list[dict[str, Any]]) -> list[tuple[Any, Tensor]]:
        pairs = zip(saved_groups, self.param_groups, strict=False)  # torch compares the numbers and says so
        return [pair for saved, own in pairs for pair in zip(saved["params"], own["params"], strict=False)]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    rows: Rows | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales gradients so that their common L2 norm is at most `max_norm`; the norm is over what will be applied.

    As `torch.nn.utils.clip_grad_norm_`, with two differences: sparse gradients count with their duplicates added up
    first, and of a dense gradient with named rows these rows alone count and are scaled, as `LazyAdam.step(rows=rows)`
    will apply them; the others are left as they are. Does not depend on the number of threads.

    Args:
        parameters: parameters; those whose `grad` is None are left out.
        max_norm: the largest norm allowed.
        rows: the same that `LazyAdam.step` will be given.
        error_if_nonfinite: raise where the norm is NaN or infinite, which waits for the device; otherwise such a norm
            makes gradients NaN or 0, as in torch.

    Returns:
        The norm before scaling, a float32 scalar (float64 where a gradient is float64).

    Dense gradients are scaled in place. A sparse gradient is replaced, because its values may be the very tensor that
    an earlier layer's backward is still to read.

    Raises:
        ValueError: max_norm is negative or NaN, or as in `LazyAdam.step`.
        TypeError: as in `LazyAdam.step`.
        RuntimeError: `error_if_nonfinite` and the norm is not finite; gradients are as they were.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm}")
    rows = rows or {}
    params = [parameters] if isinstance(parameters, Tensor) else list(dict.fromkeys(parameters))
    _check_named(rows, set(params), "among the parameters given")
    with torch.no_grad():
        gradients = [(param, gradient) for param in params if (gradient := _gradient(param, rows)) is not None]
        if not gradients:
            return torch.zeros(())
        applied = [_applied(gradient) for _, gradient in gradients]
        norms = [_norm(values) for _, values in applied]
        dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]))
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(
                f"the norm of the gradients is {total.item()}: skip this step or pass error_if_nonfinite=False"
            )
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        if factor.device.type == "cpu" and factor == 1:
            return total.to(dtype)
        for (param, gradient), (ids, values) in zip(gradients, applied, strict=True):
            scale = factor.to(param.device)
            if gradient.rows is None:
                param.grad.mul_(scale)
            elif gradient.by_row:
                param.grad.index_copy_(0, ids, values * scale)
            else:
                param.grad = torch.sparse_coo_tensor(
                    param.grad._indices(), gradient.values * scale, param.shape, check_invariants=False,
                    is_coalesced=param.grad.is_coalesced(),
                )  # fmt: skip
        return total.to(dtype)


# ---- gradients -----------------------------------------------------------------------------------------------------


class _Gradient(NamedTuple):
    rows: Tensor | None  # int64 [n]; None: every row
    values: Tensor  # [n, ...], or param's shape: without rows or by row
    by_row: bool


def _gradient(param: Tensor, rows: Rows) -> _Gradient | None:
    """The parameter's gradient and the rows it is for, checked; None where there is none."""
    grad = param.grad
    if grad is None:
        return None
    if grad.layout == torch.sparse_coo:
        if param in rows:
            raise ValueError(
                "rows name the rows of a dense gradient; this parameter's is sparse and holds them itself: leave it "
                "out of rows, or make the gradient dense (nn.Embedding(sparse=False))"
            )
        if grad.sparse_dim() != 1:
            raise ValueError(f"a sparse gradient must have 1 sparse axis, the rows, got {grad.sparse_dim()}")
        gradient = _Gradient(grad._indices()[0], grad._values(), False)
    elif grad.layout != torch.strided:
        raise TypeError(f"a gradient must be dense or sparse COO, got {grad.layout}")
    elif param in rows:
        ids = rows[param]
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"rows must be an integer tensor of row ids, got {getattr(ids, 'dtype', type(ids))}")
        if param.dim() == 0:
            raise ValueError("a parameter without dimensions has no rows to name")
        gradient = _Gradient(ids.reshape(-1).to(param.device, torch.int64), grad, True)
    else:
        return _Gradient(None, grad, False)
    check_rows(gradient.rows, param.shape[0])
    return gradient


def _applied(gradient: _Gradient) -> tuple[Tensor | None, Tensor]:
    """Ids and gradient rows after duplicates have been added up or, by row, dropped; (None, values) for every row."""
    if gradient.rows is None:
        return None, gradient.values
    if gradient.by_row:
        ids = gradient.rows.unique()
        return ids, gradient.values[ids]
    return sum_duplicates(gradient.rows, gradient.values)


def _norm(x: Tensor) -> Tensor:
    """L2 norm of all elements, in float32 or float64. In fixed blocks: one block is never split between threads."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.reshape(-1)
    while x.numel() > 4096:
        end = x.numel() // 4096 * 4096
        blocks = torch.linalg.vector_norm(x[:end].view(-1, 4096), dim=1, dtype=dtype)
        x = torch.cat([blocks, torch.linalg.vector_norm(x[end:], dtype=dtype).view(1)])
    return torch.linalg.vector_norm(x, dtype=dtype)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a float or a tensor of one element, got shape {list(lr.shape)}")
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be a finite number >= 0, got {lr}")
    for number, beta in enumerate(options["betas"], 1):
        if not 0 <= float(beta) < 1:
            raise ValueError(f"beta{number} must lie in [0, 1), got {beta}")
    for name in ("eps", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {options[name]}")
    if options["capturable"]:
        raise ValueError("LazyAdam keeps its step count on the CPU and cannot run in a CUDA graph: capturable=False")
    if options["differentiable"]:
        raise ValueError("LazyAdam's step is an opaque op without a gradient: differentiable=False")


def _check_named(rows: Rows, params: set[Tensor], whose: str) -> None:
    for param in rows:
        if param not in params:
            raise ValueError(
                f"rows name a tensor of shape {list(getattr(param, 'shape', []))} that is not {whose}: the keys must "
                "be the parameters themselves"
            )


def _learning_rate(lr: float | Tensor) -> Tensor:
    """lr as the op takes it. A schedule may have changed it since it was checked; a device tensor is not waited for."""
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64)
    if lr.device.type == "cpu" and not lr.isfinite():
        raise ValueError(f"lr must be a finite number, got {lr.item()}")
    return lr


def _restored(name: str, value: Any, param: Tensor) -> Any:
    """A copy of a loaded state value as `step` keeps it."""
    if name == "step":
        return torch.tensor(float(value), dtype=torch.float32)
    if not isinstance(value, Tensor):
        return value
    dtype = torch.promote_types(param.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
