"""Times of calls on a GPU: of their kernels alone, by a replayed graph, and launched from Python."""

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def windows(run: Call, calls: int, count: int = 9, seconds: float = 3e-3) -> float:
    """Seconds of one of the `calls` that `run` makes: the median of windows of at least `seconds`."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    repeats = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    taken = []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize()
        taken.append((time.perf_counter() - start) / repeats / calls)
    return statistics.median(taken)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept = [call() for call in calls]  # distinct outputs
        except RuntimeError as error:
            print(f"no kernel time, nor of what follows, as a graph could not capture this: {error}", flush=True)
            torch.cuda.synchronize()
            return None, launched
        kernel = windows(graph.replay, count)
    del kept
    return kernel, launched


def rate(is_quick: bool) -> float:
    """Bytes a second of an addition, which reads two tensors and writes one."""
    n = 1 << 10 if is_quick else 1 << 28
    a, b, c = (torch.ones(n) for _ in range(3))
    return 12 * n / windows(lambda: torch.add(a, b, out=c), 1)
