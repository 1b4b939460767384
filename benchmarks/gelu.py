"""GELU, forward and backward: ours against torch eager and torch.compile, as shares of the rate of a copy.

    python benchmarks/gelu.py [--rows 2048] [--columns 3072] [--dtypes float32 bfloat16] [--repeats 30] [--no-compile]

Bytes that must move, M x N elements of e bytes: forward 2MNe, forward and backward 5MNe, with the bias or without.
Values and gradients are checked against float64 before anything is timed. All variants run in turn in one process,
under the same allocator setting.
"""

import torch
from bandwidth import DTYPES, arguments, measure
from timing import results_path, write_csv
from torch.nn import functional as F

import fastbert
from fastbert.testing import assert_close, run


def main() -> None:
    args = arguments(__doc__, rows=2048, columns=3072)
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        for approximate in ("none", "tanh"):
            for biased in (False, True):
                rows += benchmark(args, dtype, approximate, biased)
    write_csv(results_path("gelu"), rows)


def benchmark(args, dtype: str, approximate: str, biased: bool) -> list[dict[str, object]]:
    x, dy = (torch.randn(args.rows, args.columns).to(DTYPES[dtype]) for _ in range(2))
    inputs = [x, torch.randn(args.columns).to(x.dtype)] if biased else [x]

    def ours(x, bias=None):
        return fastbert.gelu(x, bias, approximate)

    def truth(x, bias=None):
        return fastbert.gelu(x, bias, approximate, backend="reference")

    def eager(x, bias=None):
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    few = [x[:256].contiguous(), *inputs[1:]]  # rows enough to see every path
    results = (run(ours, few, dy[:256]), run(eager, few, dy[:256]), run(truth, [v.double() for v in few], dy[:256]))
    for what, *values in zip(("y", "dx", "dbias"), *results, strict=False):
        assert_close(*values, what=what)

    case = {"op": "gelu+bias" if biased else "gelu", "form": approximate, "dtype": dtype}
    return measure(case, args, ours, eager, inputs, dy, floors=(2, 5))


if __name__ == "__main__":
    main()
