"""Learning rates against `transformers`, and how far a run is by its steps and by the clock."""

import math

import pytest
import torch

from fastbert.pretrain.schedule import Progress, learning_rate


def test_learning_rate_by_hand():
    assert [learning_rate(step, 10, 1.0, 0.2) for step in range(10)] == [
        0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip
    assert [learning_rate(step, 4, 1.0, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 2, 1.0, 1.0) for step in range(2)] == [0.5, 1.0]
    assert [learning_rate(step, 4, 2.0, 0.0, "polynomial", power=2.0) for step in range(4)] == [2.0, 1.125, 0.5, 0.125]
    assert [learning_rate(step, 4, 2.0, 0.5, "constant") for step in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert [learning_rate(step, 6, 1.0, 0.0, "wsd", decay=0.5, final=0.5) for step in range(6)] == [
        1.0, 1.0, 1.0, 1.0, 1 - math.sqrt(1 / 3) / 2, 1 - math.sqrt(2 / 3) / 2,
    ]  # fmt: skip
    halves = [learning_rate(step, 5, 1.0, 0.0, "wsd", decay=0.5) for step in range(2, 5)]
    assert halves == pytest.approx([1.0, 1 - math.sqrt(1 / 3), 1 - math.sqrt(2 / 3)]), "half of five steps are three"


@pytest.mark.parametrize(
    ("theirs", "arguments", "schedule", "own"),
    [
        ("linear", {}, "linear", {}),
        ("polynomial", {"power": 3.0, "lr_end": 2e-4}, "polynomial", {"power": 3.0, "final": 0.1}),
        ("cosine", {}, "cosine", {}),
        ("constant_with_warmup", None, "constant", {}),
        ("warmup_stable_decay", {"num_decay_steps": 8, "decay_type": "1-sqrt"}, "wsd", {"decay": 0.2}),
    ],
)
def test_learning_rates_are_those_of_transformers(theirs, arguments, schedule, own):
    """40 steps, ten of them warming up, where transformers' first one has the rate 0: theirs are a step behind."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    steps = None if schedule == "constant" else 40
    their = transformers.get_scheduler(theirs, optimizer, 10, steps, arguments)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        their.step()
    ours = [learning_rate(step, 40, 2e-3, 0.25, schedule, **own) for step in range(40)]
    assert ours == pytest.approx([*expected[1:11], *expected[10:]], rel=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_learning_rates_are_those_of_torch(power):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    polynomial = torch.optim.lr_scheduler.PolynomialLR(optimizer, 20, power)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 20, eta_min=0.1)
    for step in range(20):
        ours = learning_rate(step, 20, 1.0, 0.0, "polynomial", power=power)
        assert ours == pytest.approx(polynomial.get_last_lr()[0])
        ours = learning_rate(step, 20, 1.0, 0.0, "cosine", final=0.1)
        assert ours == pytest.approx(cosine.get_last_lr()[0])
        for scheduler in (polynomial, cosine):
            scheduler.optimizer.step()
            scheduler.step()


def parts(progress, seconds, count):
    """Takes steps at these seconds; how many of `count` parts are over behind each."""
    found = []
    for second in seconds:
        progress.clock = lambda second=second: second
        progress.advance()
        found.append(progress.parts(count))
    return found


def test_a_run_is_as_far_as_steps_or_clock_whichever_is_further():
    start = {"clock": lambda: 0.0}
    assert parts(Progress(8, None, **start), range(100, 900, 100), 4) == [0, 1, 1, 2, 2, 3, 3, 4], "no clock counts"
    timed = Progress(None, 1.0, **start)
    assert timed.expected_steps() is None and timed.done() == (0, 60_000)
    assert parts(timed, [14.9, 15.0, 59.999, 61.0], 4) == [0, 1, 3, 4]
    assert timed.over and timed.done() == (61_000, 60_000)
    both = Progress(4, 1.0, **start)
    assert parts(both, [10.0], 4) == [1] and both.done() == (1, 4) and both.expected_steps() == 4
    assert parts(both, [45.0], 4) == [3] and both.done() == (45_000, 60_000) and both.expected_steps() == 3
    resumed = Progress(None, 1.0, step=7, milliseconds=30_000, clock=lambda: 1000.0)
    assert parts(resumed, [1010.0], 6) == [4] and (resumed.step, resumed.milliseconds) == (8, 40_000)
    assert parts(Progress(3, None), [0.0, 0.0, 0.0], 1000) == [333, 666, 1000], "more evaluations than steps"
