"""How many steps a run takes and with which learning rate: arithmetic, no clock and no tensor."""

import math


def learning_rate(step: int, steps: int, highest: float, warmup: float) -> float:
    """Of step `step` (from 0) of `steps`: rises linearly over their share `warmup`, then falls linearly to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (steps - step) / max(1, steps - rising)


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """After which steps a run is evaluated: evenly spread, the last step always among them."""
    return {round(steps * (i + 1) / evaluations) for i in range(evaluations)}


def steps_that_fit(seconds: float, step: float, evaluation: float, evaluations: int) -> int:
    """Steps of `step` seconds that fit into `seconds` beside `evaluations` of `evaluation` seconds; at least 1."""
    return max(1, int((seconds - evaluations * evaluation) / step))


def steps_in_time(steps: int, step: int, taken: int, seconds: float, allowed: float) -> int:
    """How many steps a run takes in the end: fewer than planned where the machine has become slower than it was.

    Args:
        steps: the run's planned steps.
        step: steps taken in all.
        taken: steps taken by this process, within `seconds` including its evaluations and snapshots.
        allowed: seconds in which this process is to be done.

    Returns:
        `steps` while the end comes within 1.1 times `allowed`, else what `allowed` has room for; at least one step
        more, so that the learning rate ends at 0. The first tenth of the time, in which programs warm up, decides
        nothing.
    """
    pace = seconds / taken
    if seconds < 0.1 * allowed or seconds + pace * (steps - step) <= 1.1 * allowed:
        return steps
    return min(steps, step + max(1, int((allowed - seconds) / pace)))
