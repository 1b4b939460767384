"""Cross entropy over a vocabulary, forward and backward: ours against torch eager and torch.compile, beside a copy.

    python benchmarks/cross_entropy.py [--rows 320] [--columns 30522] [--dtypes float32 bfloat16] [--repeats 30]
                                       [--no-compile]

Torch's is what a masked-word head does: `F.cross_entropy(logits.float(), labels)`, a float32 copy of 16-bit logits
first. Bytes that must move, M x V elements of e bytes: forward MVe, forward and backward 3MVe. Losses and gradients are
checked against float64 before anything is timed. All variants run in turn in one process, under the same allocator
setting.
"""

from collections.abc import Iterator

import torch
from bandwidth import Row, benchmark

from fastbert.bench.problem import Problem
from fastbert.bench.problems import cross_entropy


def problems(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[Row, Problem]]:
    yield {"op": "cross_entropy", "rows": rows, "columns": columns}, cross_entropy(rows, columns, dtype)


if __name__ == "__main__":
    benchmark("cross_entropy", __doc__, 320, 30522, problems)
