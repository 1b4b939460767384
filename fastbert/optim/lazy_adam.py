"""LazyAdam: one optimizer for dense parameters and for tables of which a batch touches a few rows.

The update itself is an op (`fastbert.ops.lazy_adam`); here are parameter groups and what counts as touched. Options,
gradients, state, loading, plans and missed steps have a file each. Everything is checked before anything is changed.
"""

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastbert.backends import requested
from fastbert.backends.lazy_adam import can_plan
from fastbert.ops.lazy_adam import check, has_plans
from fastbert.optim import gradients, replay, state
from fastbert.optim.gradients import Gradient, Rows
from fastbert.optim.loading import Loading
from fastbert.optim.missed import MissedSteps
from fastbert.optim.options import (
    Formula,
    check_choices,
    check_options,
    check_param,
    check_touched,
    choices_of,
    decay_groups,
    formula_of,
    name_dtype,
)
from fastbert.optim.plan import Plans, Taken, arguments_of, step_by_arguments
from fastbert.optim.scaling import Scaling, scaling_of
from fastbert.optim.shards import first_row, is_shard, local, spread


class LazyAdam(MissedSteps, Loading, Optimizer):
    """AdamW that moves only the rows a batch touched: weight, both moments and weight decay.

    **`weight_decay` is 0.0 unless given, not AdamW's 0.01.** It is decoupled, as in AdamW, and a row decays when it is
    touched. What a gradient touches:

    - dense: every row, the step of `torch.optim.AdamW`; `lazy="nonzero"` leaves rows alone whose gradient is all zero;
    - dense, with `step(rows={param: ids})`: the named rows, the rest of the gradient is ignored;
    - sparse (`nn.Embedding(sparse=True)`): the rows it holds. It is never coalesced; duplicates are added up in
      float32 (float64 for float64), in the order they stand in, whatever the gradient's dtype.

    Untouched rows keep their bits. Bias correction counts the parameter's steps with a gradient, empty ones included,
    as `torch.optim.SparseAdam` counts; a parameter whose `grad` is None is left out, named in `rows` or not. Results do
    not depend on the number of threads.

    Parameters may be float32, bfloat16 or float16 (float64 on the reference backend), of any shape; rows are the first
    axis. State is float32 (float64 for float64) under torch's names `step`, `exp_avg`, `exp_avg_sq` and
    `max_exp_avg_sq`, so that state dicts go to and from `torch.optim.Adam`, `AdamW` and `SparseAdam`;
    `load_state_dict` copies them and keeps float32 for parameters of any dtype. A parameter that is not contiguous is
    copied there and back at every step.

    **As `torch.optim.SparseAdam`**: `eps_mode="sparse_adam"`. **As TensorFlow's LazyAdam**: the same with `eps=1e-7`.
    **As BERT's own**: `LazyAdam.bert(model)`.

    **Missed steps.** Left alone, a row keeps where it is between its batches. With `missed="replay"` it takes, when it
    is read next, every step dense AdamW would have taken meanwhile by momentum and weight decay: AdamW's trajectory at
    lazy cost, any schedule included. `attach(embedding)` has rows brought before they are read and all of them before
    `state_dict()` of the module. The optimizer's own `state_dict()` changes nothing: it keeps how far each row is, and
    a resumed run is bitwise the unbroken one, if the model was saved within `with optimizer.raw():`. Call `flush()`
    before the state goes to another optimizer and before the model is copied or averaged
    (`torch.optim.swa_utils.AveragedModel`). A table that is read otherwise than through the attached module, as a tied
    decoder reads all of it, has to be brought by `catch_up` before; a step whose gradient is of rows that were not
    brought raises. Where processes exchange rows see `fastbert.all_gather_ids`. For float32 parameters.

    **FSDP2.** Parameters may be DTensors split by rows, as `fully_shard` makes them: each process steps its own part.
    Named rows are those of the whole table and of all processes (`all_gather_ids`); `clip_factor` and
    `clip_grad_norm_` measure all parts together. State is split alike, for `torch.distributed.checkpoint`. Not with
    `missed="replay"`.

    **Checkpoints of `torch.distributed.checkpoint`.** Its `get_optimizer_state_dict` and `set_optimizer_state_dict`
    have state made by a step with learning rate 0 and gradients of zero. As an optimizer's first, such a step makes the
    state that the options need and is not counted, so that training goes on as if it had not been.

    Sources: Kingma and Ba, "Adam: a method for stochastic optimization" (2015); Loshchilov and Hutter, "Decoupled
    weight decay regularization" (2019); the lazy form is TensorFlow's LazyAdamOptimizer, with AdamW's eps.

    Args (all but `params` may differ by group):
        params: parameters, named parameters, or group dicts, as for every torch optimizer.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: on touched rows.
        amsgrad: divide by the largest second moment so far.
        maximize: step uphill.
        foreach, fused: accepted, without effect.
        capturable: keep the step count on the parameter's device; on a GPU it always is.
        differentiable: must be False.
        decoupled_weight_decay: False is Adam's L2 penalty, for dense steps alone.
        lazy: "nonzero" as above; "rows": a dense gradient without named rows raises instead of moving every row.
        padding_idx: this row never moves; `attach` takes it from the embedding.
        eps_mode: "adam" adds eps after bias correction, "sparse_adam" before it.
        bias_correction: "global", "row" (by each row's own count of steps) or None.
        missed: "leave" or "replay".
        stochastic_rounding: of bfloat16 parameters, so that steps below their resolution count on average.
        seed: of stochastic rounding; the same seed rounds the same way on every backend.
        exp_avg_dtype: torch.bfloat16 halves the first moment; groups hold the name, "bfloat16".
        row_wise: one number of second moment per row, fed by the row's mean square; for parameters of two or more axes.

    Raises:
        ValueError: an option outside its range, options that do not go together, or a parameter whose elements share
            memory. An option that is changed in a group later is held to the same rules at the next step.
        TypeError: an option of another type; a parameter that is complex, an integer or sparse itself, or one that
            stands for other tensors, but for a DTensor that is split by rows.
    """

    _step_supports_amp_scaling = True  # what GradScaler asks

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
        decoupled_weight_decay: bool = True,
        lazy: str | None = None,
        padding_idx: int | None = None,
        eps_mode: str = "adam",
        bias_correction: str | None = "global",
        missed: str = "leave",
        stochastic_rounding: bool = False,
        seed: int = 0,
        exp_avg_dtype: torch.dtype | str | None = None,
        row_wise: bool = False,
    ) -> None:
        options = dict(locals())
        defaults = {name: value for name, value in options.items() if name not in ("self", "params", "__class__")}
        name_dtype(defaults)
        self._padding: dict[Tensor, int] = {}  # of attached embeddings
        self._copies: dict[Tensor, Tensor] = {}  # in bfloat16, of some parameters
        self._is_captured = False  # a CUDA graph has the addresses of the state
        self._checked: list[tuple] = []  # of each group, the options that were found to hold
        self._forget_plans()
        super().__init__(params, defaults)

    @classmethod
    def bert(cls, model: nn.Module, lr: float | Tensor = 1e-4, weight_decay: float = 0.01, **options: Any) -> Self:
        """BERT's AdamWeightDecayOptimizer: no bias correction, eps 1e-6, no decay on biases and LayerNorm.

        Source: Devlin et al., "BERT" (2019), `optimization.py` of its code, which clips the gradient norm to 1.0.
        """
        options = {"eps": 1e-6, "bias_correction": None, **options}
        return cls(decay_groups(model, weight_decay), lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; its options override the constructor's. Raises as the constructor does.

        A CUDA graph of an earlier step goes on without them, which is warned of.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict with the key 'params', got {type(param_group)}")
        name_dtype(param_group)
        options = {**self.defaults, **param_group}
        check_options(options)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_param(param, options)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._checked.append(choices_of(self.param_groups[-1]))
        if self._is_captured:
            warnings.warn(
                "a step of this optimizer was captured as a CUDA graph, which goes on without the parameters that are "
                "added now: capture the step anew",
                stacklevel=2,
            )

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        rows: Rows | None = None,
        grad_factor: Tensor | None = None,
    ) -> Any:
        """One step.

        Args:
            closure: evaluates the model anew and returns the loss; runs first, with gradients enabled.
            rows: for parameters with a dense gradient, the ids of the rows that step: any shape, any integer type,
                duplicates count once. A named row with zero gradient takes an ordinary step. Ids on a device other
                than the CPU are not checked here, which would wait for the device. Of processes that share a gradient
                each must name the rows of all: `fastbert.all_gather_ids(ids)`.
            grad_factor: a tensor of one number that every gradient is multiplied by on its way, as
                `clip_factor` gives it; the gradients stay as they are. On the parameters' device nothing waits for it.

        `torch.amp.GradScaler.step` passes its scale and whether it found an infinite gradient by the attributes
        `grad_scale` and `found_inf`, as to torch's own fused optimizers: gradients are divided within the step, and
        with an infinite one it changes nothing, the count of steps included. A GPU is not waited for, unless a group
        has `missed="replay"`.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError: ids outside the table, ids for a parameter that is not this optimizer's or whose gradient is
                sparse, a gradient with more than one sparse axis, a dense gradient without ids where `lazy="rows"`, L2
                decay on rows, an option that was changed to what the constructor would refuse.
            TypeError: ids that are not an integer tensor, a gradient of another layout than strided or COO, an option
                as above.
            RuntimeError: `missed="replay"` and a gradient for a row that was not brought up to date before it was read,
                or for the whole table where any row was not.

        A step that raises has changed nothing, the closure apart.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure must be callable, got {type(closure)}; rows are named: step(rows=...)")
            with torch.enable_grad():
                loss = closure()
        rows = {} if rows is None else rows
        gradients.check_named(rows, set(self._parameters()) if rows else set(), "this optimizer's")
        self._check_changed_options()
        scaling = scaling_of(self, grad_factor)
        if scaling.says_stop():
            return loss
        taken, number = [], 0
        for group, formula in zip(self.param_groups, self._current_formulas(), strict=True):
            for param in group["params"]:
                gradient = gradients.read(param, rows)
                if gradient is not None:
                    its = self.state.get(param, {})
                    if is_shard(param):
                        param, its = local(param), {name: local(value) for name, value in its.items()}
                    taken.append((number, param, its, gradient, group, formula))
                number += 1
        if taken and taken[0][1].is_cuda and torch.cuda.is_current_stream_capturing():
            self._is_captured = True
        if closure is None and not self.state and state.is_asked_for(self.param_groups, [take[3] for take in taken]):
            for number, param, _, _, group, _ in taken:
                whole = self._parameters()[number]
                self.state[whole] = spread(state.complete({}, param, group), whole)
            return loss
        self._take(taken, scaling)
        return loss

    def _take(self, taken: list[Taken], scaling: Scaling) -> None:
        """The step of all that have a gradient, each by its plan or, where it can have none, by all its arguments.

        Of a parameter that is split over processes `taken` has this process's part, and its part of the state.
        """
        backend = requested()
        if self._plans.backend != backend:
            self._plans = Plans(backend, self._copies)
        by_module = can_plan and not torch.compiler.is_compiling()
        plans, listed, replayed, completed, scalings = self._plans, [], [], {}, {}
        owners = self._parameters()
        plans.begin(len(owners))
        have_plans = plans.take(taken) if by_module else [False] * len(taken)
        for (number, param, its, gradient, group, formula), has_plan in zip(taken, have_plans, strict=True):
            if group["missed"] == "replay":
                replay.check_gradient(gradient, its, self._padding_idx(param, group))
            if not has_plan:
                check_touched(group, param.shape, gradient.rows is not None)
                its = completed[number] = state.complete(its, param, group)
                padding_idx = self._padding_idx(owners[number], group)
                copy = self._copies.get(param)
                kind = param.device, param.dtype == torch.float64
                scalings[kind] = scalings.get(kind) or scaling.on(param)  # the very tensors for all of a kind
                on_it = scalings[kind]
                arguments = arguments_of(number, param, its, gradient, group, formula, padding_idx, on_it, copy)
                check(arguments)
                planned = by_module and has_plans(param, backend)
                if not (planned and plans.make(number, arguments, param, its, gradient)):
                    listed.append((param, arguments))
            if "last_step" in its:
                replayed.append((param, gradient, group, formula))
        # from here on something changes
        self.state.update({owners[number]: spread(its, owners[number]) for number, its in completed.items()})
        for param, gradient, group, formula in replayed:
            self._record(param, gradient, group, formula)
        groups = [(len(g["params"]), f) for g, f in zip(self.param_groups, self._formulas, strict=True)]
        plans.finish(groups, scaling)
        step_by_arguments(listed, backend)
        for param, gradient, *_ in replayed:
            if "last_step" in (its := self.state[param]):
                replay.note(its, gradient.rows)

    def _check_changed_options(self) -> None:
        """Checks the groups whose options are not those that were checked last; numbers are checked at every step."""
        del self._checked[len(self.param_groups) :]
        for number, group in enumerate(self.param_groups):
            name_dtype(group)
            choices = choices_of(group)
            if self._checked[number : number + 1] == [choices]:
                continue
            self._forget_plans()
            check_choices(group)
            for param in group["params"]:
                check_param(param, group)
                state.check_kept(self.state.get(param, {}), param, group)
            self._checked[number : number + 1] = [choices]

    def _forget_plans(self) -> None:
        """Options have changed, which every plan was made of."""
        self._plans = Plans(requested(), self._copies)
        self._formulas: list[Formula] = []  # of each group, in its last step

    def _current_formulas(self) -> list[Formula]:
        before = [*self._formulas, *[None] * len(self.param_groups)]
        self._formulas = [formula_of(group, last) for group, last in zip(self.param_groups, before, strict=False)]
        for last, now in zip(before, self._formulas, strict=False):
            if last and bool(last.weight_decay) != bool(now.weight_decay):
                self._plans = Plans(self._plans.backend, self._copies)  # `check_touched` goes by whether there is decay
        return self._formulas

    def _record(self, param: Tensor, gradient: Gradient, group: dict[str, Any], formula: Formula) -> None:
        """Before a step: what rows that it leaves out will have missed."""
        its, padding_idx = self.state[param], self._padding_idx(param, group)
        if group["missed"] != "replay":  # any more
            replay.end(param, its, padding_idx)
        elif gradient.rows is not None:
            options = (formula.beta1, formula.beta2, formula.eps, formula.flags & replay.FLAGS)
            replay.record(param, its, float(group["lr"]), formula.weight_decay, options, padding_idx)

    def clip_factor(
        self, max_norm: float, *, rows: Rows | None = None, error_if_nonfinite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The norm of all gradients, and the factor by which `step` clips it to `max_norm`.

            norm, factor = optimizer.clip_factor(1.0)
            optimizer.step(grad_factor=factor)

        does what `fastbert.clip_grad_norm_` and a step do, with one pass over the gradients less; they stay as they
        are. Arguments and errors are that function's.

        Returns:
            Two scalars on the gradients' device, which is not waited for.
        """
        return gradients.norm_and_factor(self._parameters(), max_norm, rows, error_if_nonfinite)

    def grad_norm(self, *, rows: Rows | None = None, error_if_nonfinite: bool = False) -> Tensor:
        """The L2 norm over what the gradients of all groups will apply, a scalar; see `fastbert.clip_grad_norm_`."""
        return gradients.total_norm(self._parameters(), rows, error_if_nonfinite)

    def keep_copy(self, param: Tensor, out: Tensor | None = None) -> Tensor:
        """A bfloat16 copy of a float32 parameter, which steps from now on write together with it.

        That saves casting the weight for the next forward pass. Whoever changes the parameter by other means also
        changes the copy: `copy.copy_(param)`. The copy is not part of `state_dict`, nor of copies of the optimizer.

        Args:
            out: becomes the copy: contiguous bfloat16 of the parameter's shape, as the first rows of a larger tensor
                are. None makes one, or gives the one that is kept.

        Raises:
            ValueError: the parameter is not this optimizer's, not contiguous float32, or has `missed="replay"`, which
                moves rows between steps; or `out` does not fit it.
        """
        group = self._group_of(param)
        if param.dtype != torch.float32 or not param.is_contiguous() or group["missed"] == "replay" or is_shard(param):
            raise ValueError(
                'a copy is kept of contiguous float32 parameters that are not split, with missed="leave", got a '
                f"{type(param).__name__} of {param.dtype}, strides {list(param.stride())}, missed={group['missed']!r}"
            )
        if out is not None and (
            out.dtype != torch.bfloat16 or out.shape != param.shape or out.device != param.device
            or not out.is_contiguous()
        ):  # fmt: skip
            raise ValueError(
                f"out must be contiguous bfloat16 {list(param.shape)} on {param.device}, got {out.dtype} "
                f"{list(out.shape)} with strides {list(out.stride())} on {out.device}"
            )
        if out is not None or param not in self._copies:
            self._copies[param] = param.detach().bfloat16() if out is None else out.copy_(param.detach())
            self._forget_plans()
        return self._copies[param]

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(param is own for own in group["params"]):
                return group
        raise ValueError(f"a parameter of shape {list(param.shape)} is not this optimizer's: pass it when you build it")

    def _padding_idx(self, param: Tensor, group: dict[str, Any]) -> int:
        """The row of `param`, or of this process's part of it, that never moves; -1 for none."""
        idx = self._padding.get(param, group["padding_idx"]) if self._padding else group["padding_idx"]
        if is_shard(param) and idx is not None:
            idx -= first_row(param)
            return idx if 0 <= idx < len(local(param)) else -1
        return -1 if idx is None else idx
