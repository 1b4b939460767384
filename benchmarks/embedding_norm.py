"""Embeddings added, normalized and dropped: ours in one op against torch eager and compiled, as shares of a copy.

    python benchmarks/embedding_norm.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30]
                                        [--no-compile]

Of M tokens and N columns of e bytes, bytes that must move: forward 4MNe (the rows of three tables read, y written);
forward and backward 9MNe and the gradients of the tables, VNe of their V rows. Values and gradients are checked against
float64 before anything is timed. All variants run in turn in one process, under the same allocator setting, and every
call draws a new dropout mask.
"""

from collections.abc import Iterator

import torch
from bandwidth import Row, benchmark

from fastbert.bench.problem import Problem
from fastbert.bench.problems import embedding_norm


def problems(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[Row, Problem]]:
    yield {"op": "embedding_norm"}, embedding_norm(rows, columns, dtype)


if __name__ == "__main__":
    benchmark("embedding_norm", __doc__, 4096, 768, problems)
