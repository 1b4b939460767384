"""Times of calls on a GPU: of their kernels alone, by a replayed graph, and launched from Python."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from fastbert.bench import timing
from fastbert.bench.timing import Call, synchronize

WINDOW = 3e-3  # seconds that are timed at once, at least


def windows(run: Call, calls: int, count: int = 9, seconds: float = WINDOW) -> float:
    """Seconds of one of the `calls` that `run` makes: the median of windows of at least `seconds`."""
    repeats, taken = _repeats(run, seconds), []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize()
        taken.append((time.perf_counter() - start) / repeats / calls)
    return statistics.median(taken)


def _repeats(run: Call, seconds: float) -> int:
    """How many calls of `run` take so many seconds."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))


def measure(make: Callable[[], Call], count: int, waits: bool = False) -> tuple[float | None, float]:
    """Seconds of a call on the GPU alone, None where that cannot be had, and launched from Python; `count` in turn.

    What `waits` for the device is not captured: a capture that fails leaves torch's allocator as if it went on, and no
    later one in the process succeeds.
    """
    if not torch.cuda.is_available():
        calls = [make() for _ in range(count)]
        return None, windows(lambda: [call() for call in calls], count, 3, 0)
    synchronize()  # with what made the inputs that all calls share
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward
        calls = [make() for _ in range(count)]
        for call in calls * 2:
            call()
        launched = windows(lambda: [call() for call in calls], count)
        if waits:
            return None, launched
        graph = _captured(calls, stream)
        return (None if graph is None else windows(graph.replay, count)), launched


def _captured(calls: Sequence[Call], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """The calls, which were made before on this stream, as one graph; None, and a line of why, where that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]  # distinct outputs: each has memory of its own
    except RuntimeError as error:
        print(f"no kernel time, nor of what follows, as a graph could not capture this: {error}", flush=True)
        torch.cuda.synchronize()
        return None
    del kept
    return graph


def rounds(
    variants: Mapping[str, Callable[[int], Call]], count: int, repeats: int, waits: Collection[str] = ()
) -> tuple[dict[str, list[float]], set[str]]:
    """Seconds of a call of each variant on the GPU alone, in rounds as `timing.rounds` has them.

    Args:
        variants: make, by name, the call on copy i of the inputs.
        count: copies that one graph goes through, so many that they do not all lie in the L2 cache.
        repeats: rounds. In each a variant's graph is replayed for at least WINDOW seconds.
        waits: names of variants that wait for the device, which no graph can capture: they are launched one by one.

    Returns:
        The seconds by name, and the names of the variants that were launched one by one.
    """
    synchronize()  # with what made the inputs
    stream, runs, launched, many = torch.cuda.Stream(), {}, set(), {}
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward
        for name, make in variants.items():
            calls = [make(i) for i in range(count)]
            for call in calls * 2:
                call()
            graph = None if name in waits else _captured(calls, stream)
            if graph is None:
                launched.add(name)
            one = _in_turn(calls) if graph is None else graph.replay
            repeated = _repeats(one, WINDOW)
            runs[name], many[name] = _in_turn([one] * repeated), repeated * count
        taken = timing.rounds(runs, repeats, 1)
    return {name: [seconds / many[name] for seconds in its] for name, its in taken.items()}, launched


def _in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def rate(is_quick: bool) -> float:
    """Bytes a second of an addition, which reads two tensors and writes one."""
    n = 1 << 10 if is_quick else 1 << 28
    a, b, c = (torch.ones(n) for _ in range(3))
    return 12 * n / windows(lambda: torch.add(a, b, out=c), 1)
