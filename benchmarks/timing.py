"""What the benchmark scripts share: the timing of `fastbert bench`, and a dated CSV file."""

import csv
import datetime
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastbert import files
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
    """Writes the rows under a header of all their columns, each row ended by the columns of `machine()`.

    A run that writes its rows as they come has the last ones whole when it is stopped in between.
    """
    rows = [{**row, **machine()} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    files.write(path.parent, {path.name: text.getvalue().encode()})
    print(f"written: {path}")
