"""GELU, forward and backward: ours against torch eager and torch.compile, as shares of the rate of a copy.

    python benchmarks/gelu.py [--rows 2048] [--columns 3072] [--dtypes float32 bfloat16] [--repeats 30] [--no-compile]

Bytes that must move, M x N elements of e bytes: forward 2MNe, forward and backward 5MNe, with the bias or without.
Values and gradients are checked against float64 before anything is timed. All variants run in turn in one process,
under the same allocator setting.
"""

import itertools
from collections.abc import Iterator

import torch
from bandwidth import Row, benchmark

from fastbert.bench.problem import Problem
from fastbert.bench.problems import gelu


def problems(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[Row, Problem]]:
    for form, biased in itertools.product(("none", "tanh"), (False, True)):
        yield {"op": "gelu+bias" if biased else "gelu", "form": form}, gelu(rows, columns, dtype, form, biased)


if __name__ == "__main__":
    benchmark("gelu", __doc__, 2048, 3072, problems)
