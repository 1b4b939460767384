"""Missed steps made up for at once, against dense AdamW that took every one of them."""

import functools
import math

import pytest
import torch
from op_cases import assert_same_for_threads

import fastbert
from fastbert.backends import requested
from fastbert.ops.lazy_adam import EPS_UNCORRECTED, NO_BIAS_CORRECTION
from fastbert.ops.lazy_adam_replay import lazy_adam_replay
from fastbert.testing import assert_close

SIZES = [1e-8, 1e-6, 1e-4, 1.0]  # of gradients
V, D = 12, 37  # of each size three rows, last touched at three different steps


def schedule(steps):
    """lr and weight decay of each step: warm-up, decay and a jump."""
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    return 1e-3 * torch.minimum(i / 20, 2 / (1 + i / 100)) + 1e-3 * (i == 40).double(), 0.1 * (1.0 + (i > 60).double())


def dense(gradients, lr, decay, beta1, beta2, eps, dtype):
    """torch's AdamW over all steps; gradients [steps, V, D]. Yields weight, m, v after each step."""
    # Small, so that the movement is not lost in the weight.
    p = 1e-3 * torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = p.to(dtype).requires_grad_()
    optimizer = torch.optim.AdamW([p], betas=(beta1, beta2), eps=eps)
    for g, rate, wd in zip(gradients, lr.tolist(), decay.tolist(), strict=True):
        optimizer.param_groups[0].update(lr=rate, weight_decay=wd)
        p.grad = g.to(dtype)
        optimizer.step()
        state = optimizer.state[p]
        yield [x.detach() for x in (p, state["exp_avg"], state["exp_avg_sq"])]


def gradients_of(steps, last):
    """Every row gets gradients up to step `last[row]`, then none."""
    scale = torch.tensor(SIZES, dtype=torch.float64).repeat_interleave(V // len(SIZES))[:, None]
    g = torch.randn(steps, V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * scale
    return g * (torch.arange(1, steps + 1)[:, None] <= last)[:, :, None]


# First missed step (of three rows each), number of missed steps, eps. The kernels walk the steps where bias correction
# still moves, else expand their sum; momentum ends after some 200 steps.
CASES = {
    "one step, walked": (1, 1, 1e-8),
    "few steps, walked": (4, 7, 1e-6),
    "many steps, walked": (1, 600, 1e-8),
    "walked by some rows, expanded for others": (30, 100, 0.0),
    "one step, expanded": (900, 1, 1e-8),
    "few steps, expanded": (250, 7, 0.0),
    "many steps, expanded": (900, 600, 1e-6),
    "more steps than momentum lasts": (250, 600, 1e-8),
}


@functools.cache
def judged(case):
    """last [V], steps, lr and decay of the recorded ones, and by dtype: state to start from and AdamW's at the end."""
    first, gap, eps = CASES[case]
    last = first + torch.arange(3).repeat(V // 3)
    steps = int(last.max()) + gap
    lr, decay = schedule(steps)
    g = gradients_of(steps, last)
    before, made = first - 1, {}  # the record begins at the first row's last step
    for dtype in (torch.float32, torch.float64):
        start = [torch.zeros(V, D, dtype=dtype) for _ in range(3)]
        for number, state in enumerate(dense(g, lr, decay, 0.9, 0.999, eps, dtype), 1):
            for row in (last == number).nonzero().flatten().tolist():  # each row as it stood after its own last step
                for mine, all_rows in zip(start, state, strict=True):
                    mine[row] = all_rows[row]
        made[dtype] = start, [x.clone() for x in state]
    return last, steps, lr[before:], decay[before:], eps, made


@pytest.mark.parametrize("case", CASES)
def test_equals_adamw(backend, case):
    last, steps, lr, decay, eps, made = judged(case)
    truths = made[torch.float64][1]
    for dtype in (torch.float32, torch.float64) if backend == "reference" else (torch.float32,):
        start, adamw = made[dtype]
        state, counters = [x.clone() for x in start], last.int()
        for rows in (torch.randint(0, V, (60,)), None):
            options = lr, decay, steps, 0.9, 0.999, eps, 0, -1, requested()
            lazy_adam_replay(*state, counters, rows, *options)
        assert (counters == steps).all()
        for name, ours, theirs, truth in zip(("w", "m", "v"), state, adamw, truths, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))
            else:
                for size in range(len(SIZES)):
                    own = slice(3 * size, 3 * size + 3)
                    assert_close(ours[own], theirs[own], truth[own], f"{name} of gradients {SIZES[size]}")


def call(state, rows, lr, decay, step, flags=0, padding_idx=-1, betas=(0.5, 0.81), eps=0.0):
    lazy_adam_replay(*state, rows, lr, decay, step, *betas, eps, flags, padding_idx, requested())


@pytest.mark.parametrize(
    "flags", [NO_BIAS_CORRECTION, NO_BIAS_CORRECTION | EPS_UNCORRECTED], ids=["", "eps uncorrected"]
)
def test_two_missed_steps_by_hand(backend, flags):
    """beta1 1/2, sqrt(beta2) 0.9, m 0.9, v 1, lr 1 then 2, no decay: w falls by 0.45 / 0.9 and 2 * 0.225 / 0.81."""
    state = [torch.full((3, 2), 5.0), torch.full((3, 2), 0.9), torch.ones(3, 2), torch.tensor([7, 7, 9]).int()]
    lr, zero = torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double()
    call(state, torch.tensor([1, 2, 1]), lr, zero, 9, flags)
    moved = 5 - 0.45 / 0.9 - 2 * 0.225 / 0.81
    torch.testing.assert_close(state[0], torch.tensor([[5.0, 5.0], [moved, moved], [5.0, 5.0]]))
    torch.testing.assert_close(state[1][1], torch.full((2,), 0.225))
    torch.testing.assert_close(state[2][1], torch.full((2,), 0.81**2))
    assert state[3].tolist() == [7, 9, 9]


def test_eps_stands_where_the_flag_says(backend):
    """One missed step, number 2, after which v is 1 and v_hat, by beta2^2 = 3/4, is 4: eps 1 stands beside 2 or 1."""
    for flags, denominator in ((0, 2 + 1), (EPS_UNCORRECTED, 2 + 2)):
        v = torch.full((1, 3), 1 / math.sqrt(0.75))
        state = [torch.zeros(1, 3), torch.full((1, 3), 0.75), v, torch.tensor([1]).int()]
        lr = torch.ones(1, dtype=torch.float64)
        call(state, None, lr, 0 * lr, 2, flags, betas=(0.5, math.sqrt(0.75)), eps=1.0)
        torch.testing.assert_close(state[0], torch.full((1, 3), -0.375 / 0.75 / denominator))


@pytest.mark.parametrize("before", [0, 2000], ids=["walked", "expanded"])
def test_rows_without_momentum_only_decay(backend, before):
    """By eps 0 too, where their movement would be 0 / 0."""
    state = [torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2,), before).int()]
    lr, decay = torch.full((50,), 0.1).double(), torch.full((50,), 0.5).double()
    call(state, None, lr, decay, before + 50, padding_idx=1, betas=(0.9, 0.999))
    torch.testing.assert_close(state[0], torch.tensor([[0.95**50], [1.0]]).expand(2, 3))
    assert state[3].tolist() == [before + 50] * 2 and not state[1].any()


def test_bits_do_not_depend_on_threads(kernels):
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(3000, 33, generator=generator)
    start = [torch.randn(3000, 33, generator=generator), 0.1 * g, 1e-3 * g * g, torch.arange(3000).int() % 400]
    lr, decay = (x.double() for x in schedule(400))
    rows = torch.randint(0, 3000, (5000,), generator=generator)

    def replayed():
        state = [x.clone() for x in start]
        call(state, rows, lr, decay, 400, betas=(0.9, 0.999), eps=1e-8)
        return state

    assert_same_for_threads(replayed)


def test_rows_ahead_stay_where_they_are(backend):
    state = [torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3), torch.tensor([9, 5, 3, 6]).int()]
    before, lr = [x.clone() for x in state], torch.ones(3).double()
    call(state, None, lr, 0 * lr, 5, betas=(0.9, 0.999), eps=1e-8)
    assert state[3].tolist() == [9, 5, 5, 6]
    moved = [(a != b).flatten(1).any(1).tolist() for a, b in zip(state[:3], before[:3], strict=True)]
    assert moved == 3 * [[False, False, True, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 3])}, r"row ids must lie in \[0, 3\), got 3"),
        ({"rows": torch.tensor([0.0])}, "rows must be int64"),
        ({"betas": (0.9, 0.81)}, r"beta1 < sqrt\(beta2\)"),
        ({"lr": torch.zeros(3)}, "lr must be float64"),
        ({"step": 1}, "one for each of the last H <= 1 steps"),
        ({"flags": 1}, "flags must be EPS_UNCORRECTED"),
        ({"param": torch.zeros(3, 2).half()}, "param must have param's shape"),
        ({"last_step": torch.zeros(3)}, "last_step must be int32"),
        ({"last_step": torch.zeros(6).int()[::2]}, "last_step must be contiguous"),
        ({"step": 7}, r"last_step must be 5 or more, as the 2 steps up to 7 are recorded; got 0 for row 0"),
        ({"step": 7, "rows": torch.tensor([2, 1])}, "got 0 for row [12]; nothing was changed"),
    ],
)
def test_bad_input_changes_nothing(best, change, message):
    given = {"rows": None, "lr": torch.ones(2).double(), "decay": torch.zeros(2).double(), "step": 2, **change}
    state = [change.get("param", torch.ones(3, 2)), torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3).int()]
    state[3] = given.pop("last_step", state[3])
    given.pop("param", None)
    before = [x.clone() for x in state]
    found = {"row ids": "row id outside its table", "last_step must be 5": "a row that stands before", "got 0": "a row"}
    if best == "cuda":  # what the kernels find nobody waits for
        message = next((text for begin, text in found.items() if message.startswith(begin)), message)
    with pytest.raises(ValueError, match=message):
        call(state, **given)
        fastbert.check_device_errors()
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_custom_op_is_sound():
    state = [torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3), torch.zeros(4).int()]
    lr = torch.ones(2).double()
    options = (lr, 0 * lr, 2, 0.9, 0.999, 1e-8, 0, -1, "")
    torch.library.opcheck(lazy_adam_replay, (*state, torch.tensor([1, 1, 3]), *options))
