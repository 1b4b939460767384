"""Tables with their state, and one step of them by the op and by torch, for the tests of LazyAdam's op."""

import torch

from fastbert.backends import requested
from fastbert.ops.lazy_adam import GRAD_BY_ROW, MAXIMIZE, lazy_adam_step

NAMES = ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "row_steps"]


def tables(V, D, dtype=torch.float32, amsgrad=False, row_steps=False, generator=None):
    m, v = torch.randn(V, D, generator=generator), torch.rand(V, D, generator=generator)
    u = torch.rand(V, D, generator=generator) if amsgrad else None
    steps = torch.randint(0, 50, (V,), dtype=torch.int32, generator=generator) if row_steps else None
    return [torch.randn(V, D, generator=generator).to(dtype), m, v, u, steps]


def copies(tensors, wide=False):
    return [x if x is None else x.double() if wide and x.is_floating_point() else x.clone() for x in tensors]


def step(state, rows, grad, flags=0, backend=None, t=3.0, seed=None, padding_idx=-1, number=0, eps=1e-8):
    rate = torch.tensor(0.01, dtype=torch.float64)
    options = (seed, 0.9, 0.999, eps, 0.1, flags, padding_idx, number, None, None, None, requested(backend))
    lazy_adam_step(*state, rows, grad, rate, torch.tensor(t), *options)
    return state


def torch_step(state, rows, grad, flags, t=3.0):
    """The same by torch.optim.AdamW in the parameter's own dtype, or float32 state: one step on the touched rows."""
    w, m, v, u, _ = state
    ids = torch.arange(len(w)) if rows is None else rows.unique()
    if rows is None or flags & GRAD_BY_ROW:
        g = grad[ids].float()
    else:
        g = torch.zeros_like(m).index_add_(0, rows, grad.float())[ids]
    p = w[ids].float().requires_grad_()
    p.grad = g
    optimizer = torch.optim.AdamW(
        [p], lr=0.01, weight_decay=0.1, amsgrad=u is not None, maximize=bool(flags & MAXIMIZE)
    )
    optimizer.state[p] = {"step": torch.tensor(t - 1), "exp_avg": m[ids], "exp_avg_sq": v[ids]}
    if u is not None:
        optimizer.state[p]["max_exp_avg_sq"] = u[ids]
    optimizer.step()
    result = copies(state)
    for name, table in zip(NAMES, result[:4], strict=False):
        if table is not None:
            table[ids] = (p.detach() if name == "param" else optimizer.state[p][name]).to(table.dtype)
    return result
