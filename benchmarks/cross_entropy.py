"""Cross entropy over a vocabulary, forward and backward: ours against torch eager and torch.compile, beside a copy.

    python benchmarks/cross_entropy.py [--rows 320] [--columns 30522] [--dtypes float32 bfloat16] [--repeats 30]
                                       [--no-compile]

Torch's is what a masked-word head does: `F.cross_entropy(logits.float(), labels)`, a float32 copy of 16-bit logits
first. Bytes that must move, M x V elements of e bytes: forward MVe, forward and backward 3MVe. Losses and gradients are
checked against float64 before anything is timed. All variants run in turn in one process, under the same allocator
setting.
"""

import torch
from bandwidth import DTYPES, arguments, measure
from timing import results_path, write_csv
from torch.nn import functional as F

import fastbert
from fastbert.testing import assert_close, run


def main() -> None:
    args = arguments(__doc__, rows=320, columns=30522)
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        rows += benchmark(args, dtype)
    write_csv(results_path("cross_entropy"), rows)


def benchmark(args, dtype: str) -> list[dict[str, object]]:
    x = torch.randn(args.rows, args.columns).mul(3).to(DTYPES[dtype])
    labels = torch.randint(args.columns, (args.rows,))

    def ours(x):
        return fastbert.cross_entropy(x, labels[: len(x)])

    def eager(x):
        return F.cross_entropy(x if x.dtype == torch.float64 else x.float(), labels[: len(x)])

    few, dy = x[:16], torch.ones(())
    results = (run(ours, [few], dy), run(eager, [few], dy), run(eager, [few.double()], dy))
    for what, *values in zip(("loss", "dlogits"), *results, strict=True):
        assert_close(*values, what=what)

    case = {"op": "cross_entropy", "rows": args.rows, "columns": args.columns, "dtype": dtype}
    return measure(case, args, ours, eager, [x], dy, floors=(1, 3))


if __name__ == "__main__":
    main()
