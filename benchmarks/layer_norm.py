"""LayerNorm, plain and after dropout and residual: ours against torch eager and torch.compile, as shares of a copy.

    python benchmarks/layer_norm.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30]
                                    [--no-compile]

Bytes that must move, M x N elements of e bytes: LayerNorm forward 2MNe, forward and backward 5MNe; dropout, residual
and LayerNorm forward 4MNe, forward and backward 8MNe. Plain LayerNorm has half the rows. Values and gradients are
checked against float64 before anything is timed. All variants run in turn in one process, under the same allocator
setting, and every call draws a new dropout mask.
"""

from collections.abc import Iterator

import torch
from bandwidth import Row, benchmark

from fastbert.bench.problem import Problem
from fastbert.bench.problems import dropout_add_layer_norm, layer_norm


def problems(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[Row, Problem]]:
    yield {"op": "layer_norm"}, layer_norm(rows // 2, columns, dtype)
    yield {"op": "dropout_add_layer_norm"}, dropout_add_layer_norm(rows, columns, dtype)


if __name__ == "__main__":
    benchmark("layer_norm", __doc__, 4096, 768, problems)
