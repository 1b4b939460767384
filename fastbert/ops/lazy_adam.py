"""One Adam step with decoupled weight decay, on the rows of a table that a gradient touches or on all.

    w -= lr * weight_decay * w
    m += (1 - beta1) * (g - m),   v = beta2 * v + (1 - beta2) * g * g,   u = max(u, v)     u: amsgrad alone
    w -= lr / (1 - beta1^t) * m / (sqrt(v or u) / sqrt(1 - beta2^t) + eps)

w is [V, D]; arithmetic is float32 (float64 for a float64 w), and so are m, v and u; w's dtype is rounded to once. Rows
that are not touched keep their bits in all four. Gradient rows of one id are added up in that same dtype, in the order
they stand in. t counts the steps of the parameter, or of the row where `row_steps` are given.

Flags change single terms (see below). To save memory m may be bfloat16, rounded to nearest, and v and u may be [V, 1],
one number per row, which the mean of g * g over the row feeds. A bfloat16 w is rounded stochastically where a seed is
given: up with the probability that makes it right on average.
Sources: Kingma and Ba, "Adam: a method for stochastic optimization" (2015); Loshchilov and Hutter, "Decoupled weight
decay regularization" (2019); Reddi, Kale and Kumar, "On the convergence of Adam and beyond" (2018).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backends import lazy_adam as kernels
from fastbert.backends import pick, triton
from fastbert.ops.checks import wide
from fastbert.ops.philox import lanes

GRAD_BY_ROW = 1  # flag: grad is [V, D], indexed by row id; `rows` says which of its rows step, each once
MAXIMIZE = 2  # flag: steps uphill
EPS_UNCORRECTED = 4  # flag: eps stands beside sqrt(v), before bias correction: SparseAdam, TensorFlow's LazyAdam
NO_BIAS_CORRECTION = 8  # flag: t is infinite: BERT's AdamWeightDecayOptimizer
COUPLED_DECAY = 16  # flag: weight decay joins the gradient, Adam's L2 penalty, instead of shrinking w
SKIP_ZERO = 32  # flag: a row whose gradient is all zero is left alone; grad must be [V, D]
FLAGS = 63  # all of them


class Step(NamedTuple):
    """The arguments of `lazy_adam_step`, which says what they are; lr may be a float."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    row_steps: Tensor | None
    rows: Tensor | None
    grad: Tensor
    lr: float | Tensor
    step: Tensor
    seed: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    flags: int
    padding_idx: int
    number: int
    grad_factor: Tensor | None = None
    found_inf: Tensor | None = None
    bf16_copy: Tensor | None = None

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that the step changes in place."""
        return [x for x in (*self[:5], self.bf16_copy) if x is not None]


@torch.library.custom_op(
    "fastbert::lazy_adam_step",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "row_steps", "bf16_copy"),
)
def lazy_adam_step(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    row_steps: Tensor | None,
    rows: Tensor | None,
    grad: Tensor,
    lr: Tensor,
    step: Tensor,
    seed: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    flags: int,
    padding_idx: int,
    number: int,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    bf16_copy: Tensor | None,
    backend: str,
) -> None:
    """Changes the first five arguments and `bf16_copy` in place.

    Args:
        param: [V, ...] float32, bfloat16 or float16 (float64 on the reference backend), contiguous; any shape where
            `rows` is None.
        exp_avg: m, param's shape, contiguous, float32 (float64 for a float64 param) or bfloat16.
        exp_avg_sq: v, contiguous, float32 (float64): param's shape, or [V, 1, ...], one number per row.
        max_exp_avg_sq: u, like v; None is Adam without amsgrad.
        row_steps: int32 [V], each row's own t before this step, counted up where it is touched; None takes `step`.
        rows: int64 [n], the id of each gradient row, in any order, duplicates allowed; None steps every row once.
        grad: [n, ...], one per id; [V, ...], param's shape, where `rows` is None or with the flag GRAD_BY_ROW.
        lr: one number.
        step: one number, t of this step, 1 the first time.
        seed: int64 [1], the key of stochastic rounding of a bfloat16 param; None rounds to nearest. Element (row,
            column) takes 16-bit lane `column % 8` of Philox at the counter (column // 8, row, step, 2 + 4 * number).
        flags: sum of the flags above.
        padding_idx: this row is left alone; -1 for none.
        number: tells parameters of one seed apart.
        grad_factor: one float32 number that all gradients are multiplied by first, as clipping does; None for 1. Which
            rows SKIP_ZERO leaves alone is seen before.
        found_inf: one float32 number; where it is not 0 the step changes nothing. None for 0.
        bf16_copy: bfloat16 of param's shape, contiguous: gets the new rows of a float32 param, rounded to nearest.
        backend: runs on this backend or raises; "" chooses by the tensor's device.

    Raises:
        ValueError: a shape, layout or flag that does not fit, or a row id outside the table.
        TypeError: a dtype that does not fit.
        RuntimeError: an explicit backend that cannot run here.
    """
    arguments = dict(locals())  # in the order of the signature, which is that of Step
    del arguments["backend"]
    single = Step(**arguments)
    check(single)
    backend_of(param, backend).lazy_adam_steps([single])


@lazy_adam_step.register_fake
def _(*_: Any) -> None:
    return None


def backend_of(param: Tensor, backend: str) -> Any:
    """The namespace that a step of `param` runs in; RuntimeError where `backend` was asked for and cannot."""
    return functions[pick("lazy_adam", backend, param)]


def has_plans(param: Tensor, backend: str) -> bool:
    """Whether steps of `param` can go by a plan: the C++ modules have them. In Triton dense tensors share a launch, and
    what a plan would save is little beside the launches of rows.
    """
    return pick("lazy_adam", backend, param) in ("cpu", "cuda")


def update(steps: Sequence[Step], backend: str) -> None:
    """Many `lazy_adam_step`s as the optimizer takes them, each checked by `check`.

    In eager mode they go straight to the backends, together: passing a mutating custom op costs 85 microseconds, ten
    times the update of a small parameter, and dense tensors share one parallel loop.
    """
    if torch.compiler.is_compiling():
        for s in steps:
            lazy_adam_step(*s._replace(lr=torch.as_tensor(s.lr, dtype=torch.float64)), backend)
        return
    chosen: dict[Any, list[Step]] = {}
    for s in steps:
        chosen.setdefault((backend_of(s.param, backend), s.param.device), []).append(s)
    for (namespace, _), its in chosen.items():
        namespace.lazy_adam_steps(its)
    torch.autograd.graph.increment_version([x for s in steps for x in s.changed])


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def lazy_adam_steps(steps: Sequence[Step]) -> None:
        for s in steps:
            if s.rows is not None:
                check_rows(s.rows, s.param.shape[0])
        for s in steps:
            if s.found_inf is None or not s.found_inf:
                reference.lazy_adam_step(s)

    @staticmethod
    def lazy_adam_step(s: Step) -> None:
        param, rows, grad, flags = s.param, s.rows, s.grad, s.flags
        lr = s.lr.double() if isinstance(s.lr, Tensor) else torch.tensor(s.lr, dtype=torch.float64, device="cpu")
        table_rows = param.shape[0] if param.dim() else 1
        tables = [
            None if x is None else x.view(table_rows, x.numel() // max(table_rows, 1))
            for x in (param, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq)
        ]
        columns = tables[0].shape[1]
        # gradient
        if rows is None:
            ids, g = torch.arange(table_rows, device=param.device), wide(grad.reshape(table_rows, columns))
        elif flags & GRAD_BY_ROW:
            ids = rows.unique()
            g = wide(grad.reshape(table_rows, columns)[ids])
        else:
            ids, g = sum_duplicates(rows, grad.reshape(rows.numel(), columns))
        places = slice(None)  # where all rows move nothing is gathered, and no device waited for
        if rows is not None or flags & SKIP_ZERO or s.padding_idx >= 0:
            moves = ids != s.padding_idx
            if flags & SKIP_ZERO:
                moves &= (g != 0).any(1)
            places = ids = ids[moves]
            g = g[moves]
        # update
        w, m, v, u = (None if x is None else wide(x[places]) for x in tables)
        g, m = g.to(w.dtype), m.to(w.dtype)
        if s.grad_factor is not None:
            g = g * s.grad_factor.to(g)
        t = s.step.double() if s.row_steps is None else s.row_steps[places].double().unsqueeze(1) + 1
        if flags & NO_BIAS_CORRECTION:
            t = t * math.inf
        size = (lr / (1 - s.beta1**t)).to(w.dtype)
        root = (1 - s.beta2**t).sqrt().to(w.dtype)
        if flags & MAXIMIZE:
            g = -g
        if flags & COUPLED_DECAY:
            g = g + s.weight_decay * w
        else:
            w = w * (1 - lr * s.weight_decay).to(w.dtype)
        m = m.lerp(g, 1 - s.beta1)
        square = g * g if v.shape == g.shape else (g * g).mean(1, keepdim=True)
        v = v * s.beta2 + (1 - s.beta2) * square
        if u is not None:
            u = torch.maximum(u, v)
        eps = s.eps / root if flags & EPS_UNCORRECTED else s.eps
        w = w - size * m / ((v if u is None else u).sqrt() / root + eps)
        if s.seed is not None:
            w = _round_stochastically(w, ids, s.step, s.number, s.seed)
        for table, new in zip(tables, (w, m, v, u), strict=True):
            if table is not None:
                table[places] = new.to(table.dtype)
        if s.bf16_copy is not None:
            s.bf16_copy.view(tables[0].shape)[places] = w.bfloat16()
        if s.row_steps is not None:
            s.row_steps[places] += 1


class in_triton:
    lazy_adam_steps = staticmethod(triton.function("lazy_adam", "lazy_adam_steps"))


functions = {"reference": reference, "cpu": kernels, "cuda": kernels, "triton": in_triton}


def _round_stochastically(w: Tensor, rows: Tensor, step: Tensor, number: int, seed: Tensor) -> Tensor:
    """w, float32 [R, D], in bfloat16: its bits and 16 random ones added up, of which the upper half is kept."""
    random = lanes(w.shape[1], rows.unsqueeze(1), step.long(), 2 + 4 * number, seed)
    bits = w.view(torch.int32) + random.to(torch.int32)
    return torch.where(w.isfinite(), (bits & -65536).view(torch.float32), w).bfloat16()


def sum_duplicates(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the gradient rows of each id in the order they stand in.

    Args:
        rows: int64 [n].
        grad: [n, ...].

    Returns:
        ids int64 [R], ascending, and their sums [R, ...], float32 (float64 for float64).
    """
    grad = wide(grad)
    if rows.numel() == 0:
        return rows, grad
    ordered, order = rows.sort(stable=True)
    ids, counts = ordered.unique_consecutive(return_counts=True)
    # A bag is summed by one thread in the order of its indices; index_add_ and segment_reduce are many times slower.
    sums = F.embedding_bag(
        order, grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1), counts.cumsum(0) - counts, mode="sum"
    )
    return ids, sums.view(ids.numel(), *grad.shape[1:])


def check_rows(rows: Tensor, table_rows: int) -> None:
    """Raises unless every id lies in [0, table_rows). Ids on a device other than the CPU are not waited for."""
    if rows.device.type != "cpu" or rows.numel() == 0:
        return
    low, high = (int(x) for x in rows.aminmax())
    if low < 0 or high >= table_rows:
        raise ValueError(
            f"row ids must lie in [0, {table_rows}), got {low if low < 0 else high}; nothing was changed. Ids of "
            "padding or ignored positions have to be left out"
        )


def check(s: Step) -> None:
    """Raises where arguments of `lazy_adam_step` do not fit together; row ids are left to the backends."""
    param, rows, grad, flags, seed = s.param, s.rows, s.grad, s.flags, s.seed
    exp_avg, exp_avg_sq, max_exp_avg_sq, row_steps = s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, s.row_steps
    if not param.is_floating_point() or not grad.is_floating_point():
        raise TypeError(f"param and grad must be floating tensors, got {param.dtype} and {grad.dtype}")
    shape, device = param.shape, param.device
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    if exp_avg.dtype not in (dtype, torch.bfloat16) or exp_avg.shape != shape:
        raise ValueError(
            f"exp_avg of a {param.dtype} param must be {dtype} or bfloat16 of its shape {list(shape)}, got "
            f"{exp_avg.dtype} {list(exp_avg.shape)}"
        )
    tables = [param, exp_avg, exp_avg_sq] if max_exp_avg_sq is None else [param, exp_avg, exp_avg_sq, max_exp_avg_sq]
    for x in tables[2:]:
        if x.dtype != dtype or (x.shape != shape and x.shape != row_wise_shape(param)):
            raise ValueError(
                f"exp_avg_sq of a {param.dtype} param must be {dtype} of its shape {list(shape)} or of "
                f"{list(row_wise_shape(param))}, got {x.dtype} {list(x.shape)}"
            )
    if max_exp_avg_sq is not None and max_exp_avg_sq.shape != exp_avg_sq.shape:
        raise ValueError("exp_avg_sq and max_exp_avg_sq must have one shape")
    for x in tables if row_steps is None else [*tables, row_steps]:
        if not x.is_contiguous() or (not torch.compiler.is_compiling() and x.is_neg()):
            raise ValueError("param and its state must be contiguous and not lazily negated: they are changed in place")
    if not isinstance(s.step, Tensor) or s.step.numel() != 1:
        raise ValueError(f"step must be a tensor of one number, got {s.step!r}")
    if (rows is not None or row_steps is not None) and param.dim() == 0:
        raise ValueError("a parameter without dimensions has no rows")
    if row_steps is not None and (row_steps.dtype != torch.int32 or row_steps.shape != param.shape[:1]):
        raise ValueError(f"row_steps must be int32 [{param.shape[0]}], got {row_steps.dtype} {list(row_steps.shape)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows must be int64 [n], got {rows.dtype} {list(rows.shape)}")
    by_row = rows is None or flags & GRAD_BY_ROW
    if grad.shape != (shape if by_row else (rows.numel(), *shape[1:])):
        raise ValueError(
            f"grad must have shape {list(shape if by_row else (rows.numel(), *shape[1:]))}, got {list(grad.shape)}"
        )
    for name, number, allowed in (
        ("grad_factor", s.grad_factor, (torch.float32, dtype)),
        ("found_inf", s.found_inf, (torch.float32,)),
    ):
        if number is not None and (number.dtype not in allowed or number.numel() != 1):
            raise ValueError(f"{name} must be a float32 tensor of one number, got {number.dtype} {list(number.shape)}")
    copy = s.bf16_copy
    if copy is not None:
        fits = param.dtype == torch.float32 and copy.dtype == torch.bfloat16 and copy.shape == shape
        if not fits or not copy.is_contiguous():
            raise ValueError(
                f"bf16_copy must be a contiguous bfloat16 tensor of a float32 param's shape, got {copy.dtype} "
                f"{list(copy.shape)} for {param.dtype} {list(shape)}"
            )
    for x in (*tables, row_steps, rows, grad, s.grad_factor, s.found_inf, copy):
        if x is not None and x.device != device:
            raise ValueError(f"param, state, rows and grad must be on one device, param is on {device}")
    if flags & ~FLAGS:
        raise ValueError(f"flags must be a sum of the flags of fastbert.ops.lazy_adam, at most {FLAGS}, got {flags}")
    if flags & SKIP_ZERO and not by_row:
        raise ValueError("SKIP_ZERO needs a gradient by row: of a sparse one, leave the zero rows out")
    if seed is not None and (param.dtype != torch.bfloat16 or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"stochastic rounding takes a bfloat16 param and an int64 seed of one element, got {param.dtype} and "
            f"{seed.dtype} {list(seed.shape)}"
        )


def row_wise_shape(param: Tensor) -> tuple[int, ...]:
    """Of a second moment that has one number per row: [V, 1, ...]."""
    return (*param.shape[:1], *(1 for _ in param.shape[1:]))
