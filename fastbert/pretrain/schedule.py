"""How far a run is, and the learning rate there: arithmetic of whole numbers, no tensor, and one look at the clock.

A run ends after so many steps, so many milliseconds, or whichever comes first. "Done" and "total" below are either.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Literal

Schedule = Literal["linear", "polynomial", "cosine", "wsd", "constant"]


def learning_rate(
    done: int,
    total: int,
    highest: float,
    warmup: float,
    schedule: Schedule = "linear",
    *,
    power: float = 1.0,
    decay: float = 0.2,
    final: float = 0.0,
) -> float:
    """The learning rate of what comes next, `done` of `total` steps (or milliseconds) being taken.

    Over their share `warmup` it rises linearly to `highest`, the first step's being above 0 and the last one's of them
    `highest`. From there, with x from 1 down to 0 over what remains:

    - linear: x (BERT); polynomial: x ** power; cosine: (1 + cos(pi * (1 - x))) / 2 (Loshchilov and Hutter, "SGDR",
      2017), each of highest - lowest, and above the lowest;
    - wsd, warm-up, stable, decay: `highest` until the last share `decay` of the total, over which it falls as
      1 - sqrt(1 - x) does (Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations",
      2024, who found this form and a fifth of the steps to be as good as a cosine over the whole);
    - constant: `highest`.

    The lowest is `highest` times `final`, and is reached when all is done, as in `transformers.get_scheduler`, whose
    values these are; only its warm-up is a step behind, for it begins with 0.
    """
    rising = math.ceil(warmup * total)
    if done < rising:
        return highest * (done + 1) / rising
    falling = math.ceil(decay * total) if schedule == "wsd" else total - rising
    remaining = min(total - done, falling) / max(1, falling)
    share = {
        "linear": lambda x: x,
        "polynomial": lambda x: x**power,
        "cosine": lambda x: (1 + math.cos(math.pi * (1 - x))) / 2,
        "wsd": lambda x: 1 - math.sqrt(1 - x),
        "constant": lambda x: 1.0,
    }[schedule](remaining)
    return highest * (final + (1 - final) * share)


@dataclasses.dataclass
class Progress:
    """How far a run is: its steps, its training time in all processes so far, and when it ends.

    Attributes:
        steps: after which the run ends; None for no limit.
        minutes: after which the run ends; None for no limit. One of the two is given.
        step: steps taken.
        milliseconds: how long they took, with their evaluations and snapshots, when the last one was done. Between
            steps time stands still: all that is decided there is decided alike.
        clock: seconds, from any beginning.
    """

    steps: int | None
    minutes: float | None
    step: int = 0
    milliseconds: int = 0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._began = self.clock() - self.milliseconds / 1000

    def advance(self) -> None:
        """Counts a step that was taken; the only place where the clock is read."""
        self.step += 1
        self.milliseconds = round(1000 * (self.clock() - self._began))

    def done(self) -> tuple[int, int]:
        """How many of how many steps, or milliseconds where of these a larger share is over."""
        ways = []
        if self.steps is not None:
            ways.append((self.step, self.steps))
        if self.minutes is not None:
            ways.append((self.milliseconds, max(1, round(60_000 * self.minutes))))
        return max(ways, key=lambda way: way[0] / way[1])

    def parts(self, count: int) -> int:
        """How many of `count` equal parts of the run are over."""
        done, total = self.done()
        return min(count, done * count // total)

    @property
    def over(self) -> bool:
        return self.parts(1) == 1

    def expected_steps(self) -> int | None:
        """Steps of the whole run at the pace so far; None where nothing tells yet."""
        done, total = self.done()
        return math.ceil(self.step * total / done) if done else self.steps
