import pytest

from fastbert.pretrain.schedule import evaluation_steps, learning_rate, steps_in_time, steps_that_fit


def test_learning_rate_by_hand():
    assert [learning_rate(step, 10, 1.0, 0.2) for step in range(10)] == [
        0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip
    assert [learning_rate(step, 4, 1.0, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 2, 1.0, 1.0) for step in range(2)] == [0.5, 1.0]


def test_the_last_step_is_evaluated():
    assert evaluation_steps(40, 2) == {20, 40}
    assert evaluation_steps(2, 8) >= {1, 2} and max(evaluation_steps(3, 1000)) == 3


def test_steps_that_fit_by_hand():
    assert steps_that_fit(60.0, 0.5, 1.0, 10) == 100
    assert steps_that_fit(5.0, 0.5, 1.0, 10) == 1, "no time at all is still a step"


@pytest.mark.parametrize(
    ("step", "taken", "seconds", "steps"),
    [
        (500, 500, 50.0, 1000),  # as planned
        (500, 500, 55.0, 1000),  # a tenth behind
        (500, 500, 60.0, 833),  # 0.12 s a step: 40 s are left, 333 steps
        (500, 500, 120.0, 501),  # too late: one more, at the schedule's end
        (50, 50, 9.0, 1000),  # still warming up
        (500, 100, 60.0, 566),  # a resumed process: its own pace, 0.6 s
        (999, 999, 5000.0, 1000),
    ],
)
def test_a_slower_machine_takes_fewer_steps(step, taken, seconds, steps):
    """1,000 steps within 100 s."""
    assert steps_in_time(1000, step, taken, seconds, 100.0) == steps
