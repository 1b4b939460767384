"""Dropout, forward and backward: ours against torch eager and torch.compile, as shares of the rate of a copy.

    python benchmarks/dropout.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30] [--no-compile]

Bytes that must move, M x N elements of e bytes: forward 2MNe, forward and backward 4MNe. Which elements PyTorch drops
differs, so ours is checked against its own twin, which draws the same mask, before anything is timed. All variants run
in turn in one process, under the same allocator setting, and every call draws a new mask.
"""

from collections.abc import Iterator

import torch
from bandwidth import Row, benchmark

from fastbert.bench.problem import Problem
from fastbert.bench.problems import dropout


def problems(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[Row, Problem]]:
    yield {"op": "dropout"}, dropout(rows, columns, dtype)


if __name__ == "__main__":
    benchmark("dropout", __doc__, 4096, 768, problems)
