"""What the benchmark scripts share: variants timed in turn, the machine they ran on, and a dated CSV file."""

import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Stats:
    """Seconds of one call: 20th percentile, median and 80th percentile."""

    p20: float
    median: float
    p80: float


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Stats]:
    """Times the variants in turn, so that a slow moment of the machine falls on all of them.

    Every variant is first called `warmup` times. Then come `repeats` rounds of one call each, every round beginning
    with another variant, so that none always runs after the same one. `before`, by the same names, is called ahead of
    each call and not timed.
    """
    before = before or {name: lambda: None for name in variants}
    for name, call in variants.items():
        for _ in range(warmup):
            before[name]()
            call()
    names, seconds = list(variants), {name: [] for name in variants}
    for round_ in range(repeats):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            before[name]()
            synchronize()
            start = time.perf_counter()
            variants[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: _stats(taken) for name, taken in seconds.items()}


def _stats(seconds: list[float]) -> Stats:
    if len(seconds) == 1:
        return Stats(*seconds * 3)
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Stats(p20, statistics.median(seconds), p80)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu() -> str:
    """Name of the GPU that the results are of, where it is torch's default device; "" on a CPU."""
    return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else ""


def machine() -> dict[str, str | int]:
    """Columns that say where a result comes from: GPU if any, processor, cores, threads, torch, Python and the day."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def results_path(stem: str, *what: str) -> Path:
    """`benchmarks/results/STEM-ISA-WHAT-YEAR-MONTH-DAY.csv`; a second run of the day on such a processor replaces it.

    ISA is the best instruction set of the processor as torch names it, or the name of the GPU; `what` tells runs with
    other settings apart.
    """
    isa = (gpu() or torch.backends.cpu.get_cpu_capability()).lower().replace(" ", "-")
    return RESULTS / ("-".join([stem, isa, *what, datetime.date.today().isoformat()]) + ".csv")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes the rows under a header of all their columns, each row ended by the columns of `machine()`."""
    rows = [{**row, **machine()} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")
