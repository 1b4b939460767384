"""Embeddings added, normalized and dropped: ours in one op against torch eager and compiled, as shares of a copy.

    python benchmarks/embedding_norm.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30]
                                        [--no-compile]

Of M tokens and N columns of e bytes, bytes that must move: forward 4MNe (the rows of three tables read, y written);
forward and backward 9MNe and the gradients of the tables, VNe of their V rows. Values and gradients are checked against
float64 before anything is timed. All variants run in turn in one process, under the same allocator setting, and every
call draws a new dropout mask.
"""

import torch
from bandwidth import DTYPES, arguments, measure
from timing import results_path, write_csv
from torch.nn import functional as F

import fastbert
from fastbert.ops.embedding_norm import Table, embedding_norm
from fastbert.testing import assert_close, run

EPS, DROPOUT = 1e-12, 0.1
VOCABULARY, LONGEST, TYPES = 30_522, 512, 2


def main() -> None:
    args = arguments(__doc__, rows=4096, columns=768)
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        rows += benchmark(args, dtype)
    write_csv(results_path("embedding_norm"), rows)


def benchmark(args, dtype: str) -> list[dict[str, object]]:
    sizes = VOCABULARY, LONGEST, TYPES
    inputs = [torch.randn(size, args.columns).to(DTYPES[dtype]) for size in sizes]
    inputs += [torch.randn(args.columns).to(DTYPES[dtype]) for _ in range(2)]
    ids = [torch.randint(size, (args.rows,)) for size in sizes]
    dy = torch.randn(args.rows, args.columns).to(DTYPES[dtype])

    def ours(*inputs, p=DROPOUT, backend=None):
        *tables, weight, bias = inputs
        looked_up = [Table(*each) for each in zip(tables, ids, strict=True)]
        return embedding_norm(looked_up, weight, bias, EPS, p, backend=backend)[0]

    def eager(*inputs, p=DROPOUT):
        *tables, weight, bias = inputs
        x = sum(F.embedding(its, table) for its, table in zip(ids, tables, strict=True))
        return F.dropout(F.layer_norm(x, x.shape[-1:], weight, bias, EPS), p)

    checked = (
        run(lambda *x: ours(*x, p=0.0), inputs, dy),
        run(lambda *x: eager(*x, p=0.0), inputs, dy),
        run(lambda *x: ours(*x, p=0.0, backend="reference"), [v.double() for v in inputs], dy),
    )
    for what, *values in zip(("y", "words", "positions", "types", "weight", "bias"), *checked, strict=True):
        assert_close(*values, what=what)
    floors = 4, 9 + sum(sizes) / args.rows
    return measure({"op": "embedding_norm", "dtype": dtype}, args, ours, eager, inputs, dy, floors=floors)


if __name__ == "__main__":
    main()
