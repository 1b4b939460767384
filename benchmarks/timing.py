"""What the benchmark scripts share: the timing of `fastbert bench`, and a dated CSV file."""

import csv
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastbert.bench.machine import gpu, machine
from fastbert.bench.timing import Stats, interleaved, synchronize

__all__ = ["Stats", "gpu", "interleaved", "machine", "results_path", "synchronize", "write_csv"]

RESULTS = Path(__file__).resolve().parent / "results"


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
