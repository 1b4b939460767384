"""Missed steps made up for at once, against dense AdamW that took every one of them."""

import pytest
import torch

from fastbert.backend import requested
from fastbert.ops.lazy_adam_replay import lazy_adam_replay
from fastbert.testing import assert_close

SIZES = [1e-8, 1e-6, 1e-4, 1.0]  # of gradients
V, D = 12, 37  # of each size three rows, last touched at three different steps


def schedule(steps):
    """lr and weight decay of each step: warm-up, decay and a jump."""
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    return 1e-3 * torch.minimum(i / 20, 2 / (1 + i / 100)) + 1e-3 * (i == 40).double(), 0.1 * (1.0 + (i > 60).double())


def dense(gradients, lr, decay, beta1, beta2, eps, dtype):
    """torch's AdamW over all steps; gradients [steps, V, D]. Returns weight, m, v after each step as needed."""
    # Small, so that the movement is not lost in the weight.
    p = 1e-3 * torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = p.to(dtype).requires_grad_()
    optimizer = torch.optim.AdamW([p], betas=(beta1, beta2), eps=eps)
    for g, rate, wd in zip(gradients, lr.tolist(), decay.tolist(), strict=True):
        optimizer.param_groups[0].update(lr=rate, weight_decay=wd)
        p.grad = g.to(dtype)
        optimizer.step()
        state = optimizer.state[p]
        yield [x.detach().clone() for x in (p, state["exp_avg"], state["exp_avg_sq"])]


def gradients_of(steps, last):
    """Every row gets gradients up to step `last[row]`, then none."""
    scale = torch.tensor(SIZES, dtype=torch.float64).repeat_interleave(V // len(SIZES))[:, None]
    g = torch.randn(steps, V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * scale
    return g * (torch.arange(1, steps + 1)[:, None] <= last)[:, :, None]


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-6])
@pytest.mark.parametrize("first", [1, 4, 30, 250, 900])
@pytest.mark.parametrize("gap", [1, 7, 100, 600])
def test_equals_adamw(backend, first, gap, eps):
    last = first + torch.arange(3).repeat(V // 3)
    steps = int(last.max()) + gap
    lr, decay = schedule(steps)
    g = gradients_of(steps, last)
    paths = {dtype: list(dense(g, lr, decay, 0.9, 0.999, eps, dtype)) for dtype in (torch.float32, torch.float64)}
    for dtype, path in paths.items():
        if dtype == torch.float64 and backend != "reference":
            continue
        # each row as it stood after its own last step
        state = [torch.stack([path[int(last[r]) - 1][k][r] for r in range(V)]) for k in range(3)]
        counters = last.int()
        before = first - 1  # the record begins at the first row's last step
        rows = torch.randint(0, V, (60,))
        lazy_adam_replay(
            *state, counters, rows, lr[before:], decay[before:], steps, 0.9, 0.999, eps, 0, -1, requested()
        )
        lazy_adam_replay(
            *state, counters, None, lr[before:], decay[before:], steps, 0.9, 0.999, eps, 0, -1, requested()
        )
        assert (counters == steps).all()
        for name, ours, theirs, truth in zip(("w", "m", "v"), state, path[-1], paths[torch.float64][-1], strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))
            else:
                for size in range(len(SIZES)):
                    own = slice(3 * size, 3 * size + 3)
                    assert_close(ours[own], theirs[own], truth[own], f"{name} of gradients {SIZES[size]}")
