"""Variants timed in turn in one process, so that a slow moment of the machine falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Stats:
    """20th percentile, median and 80th percentile: seconds of one call, or a ratio."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats":
        if len(values) == 1:
            return cls(*values * 3)
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(p20, statistics.median(values), p80)


def rounds(
    variants: Mapping[str, Call],
    repeats: int = 20,
    warmup: int = 3,
    before: Mapping[str, Call] | None = None,
    limit: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every variant's calls, by round.

    Every variant is first called `warmup` times. Then come `repeats` rounds of one call each, every round beginning
    with another variant, so that none always runs after the same one. `before`, by the same names, is called ahead of
    each call and not timed. What is slow is called less often: warming up ends once a variant has taken a tenth of
    `limit` seconds, and the rounds once they have taken all of it.
    """
    before = before or {name: lambda: None for name in variants}
    for name, call in variants.items():
        start = time.perf_counter()
        for _ in range(warmup):
            before[name]()
            call()
            if time.perf_counter() - start > limit / 10:
                break
    names, seconds, begun = list(variants), {name: [] for name in variants}, time.perf_counter()
    for round_ in range(repeats):
        if round_ and time.perf_counter() - begun > limit:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            before[name]()
            synchronize()
            start = time.perf_counter()
            variants[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(
    variants: Mapping[str, Call], repeats: int = 20, warmup: int = 3, before: Mapping[str, Call] | None = None
) -> dict[str, Stats]:
    """The statistics of `rounds`."""
    return {name: Stats.of(seconds) for name, seconds in rounds(variants, repeats, warmup, before).items()}


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, list[float]]:
    """The reference's time over each variant's in the same round: above 1 the variant is faster.

    Two calls of one round lie milliseconds apart, so that a clock that wanders from round to round cancels.
    """
    theirs = seconds[reference]
    return {name: [its / own for its, own in zip(theirs, owns, strict=True)] for name, owns in seconds.items()}


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
