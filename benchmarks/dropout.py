"""Dropout, forward and backward: ours against torch eager and torch.compile, as shares of the rate of a copy.

    python benchmarks/dropout.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30] [--no-compile]

Bytes that must move, M x N elements of e bytes: forward 2MNe, forward and backward 4MNe. Which elements PyTorch drops
differs, so ours is checked against its own twin, bit for bit, before anything is timed. All variants run in turn in one
process, under the same allocator setting.
"""

import torch
from bandwidth import DTYPES, arguments, measure
from timing import results_path, write_csv
from torch.nn import functional as F

import fastbert
from fastbert.testing import run

P, SEED = 0.1, 1


def ours(x):
    return fastbert.dropout(x, P, SEED)


def twin(x):
    return fastbert.dropout(x, P, SEED, backend="reference")


def main() -> None:
    args = arguments(__doc__, rows=4096, columns=768)
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        x, dy = torch.randn(2, args.rows, args.columns).to(DTYPES[dtype])
        for mine, its in zip(run(ours, [x[:256]], dy[:256]), run(twin, [x[:256]], dy[:256]), strict=True):
            assert torch.equal(mine, its)
        case = {"op": "dropout", "dtype": dtype}
        rows += measure(case, args, ours, lambda x: F.dropout(x, P), [x], dy, floors=(2, 4))
    write_csv(results_path("dropout"), rows)


if __name__ == "__main__":
    main()
