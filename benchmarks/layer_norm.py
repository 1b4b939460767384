"""LayerNorm, plain and after dropout and residual: ours against torch eager and torch.compile, as shares of a copy.

    python benchmarks/layer_norm.py [--rows 4096] [--columns 768] [--dtypes float32 bfloat16] [--repeats 30]
                                    [--no-compile]

Bytes that must move, M x N elements of e bytes: LayerNorm forward 2MNe, forward and backward 5MNe; dropout, residual
and LayerNorm forward 4MNe, forward and backward 8MNe. Plain LayerNorm has half the rows. Values and gradients are
checked against float64 before anything is timed. All variants run in turn in one process, under the same allocator
setting, and every call draws a new dropout mask.
"""

import torch
from bandwidth import DTYPES, arguments, measure
from timing import results_path, write_csv
from torch.nn import functional as F

import fastbert
from fastbert.testing import assert_close, run

EPS, DROPOUT = 1e-12, 0.1


def main() -> None:
    args = arguments(__doc__, rows=4096, columns=768)
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        rows += benchmark_layer_norm(args, dtype)
        rows += benchmark_dropout_add_layer_norm(args, dtype)
    write_csv(results_path("layer_norm"), rows)


def benchmark_layer_norm(args, dtype: str) -> list[dict[str, object]]:
    x, dy = (torch.randn(args.rows // 2, args.columns).to(DTYPES[dtype]) for _ in range(2))
    inputs = [x, *(torch.randn(args.columns).to(x.dtype) for _ in range(2))]

    def ours(x, weight, bias):
        return fastbert.layer_norm(x, weight, bias, EPS)

    def truth(x, weight, bias):
        return fastbert.layer_norm(x, weight, bias, EPS, backend="reference")

    def eager(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    results = run(ours, inputs, dy), run(eager, inputs, dy), run(truth, [v.double() for v in inputs], dy)
    for what, *values in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert_close(*values, what=what)
    return measure({"op": "layer_norm", "dtype": dtype}, args, ours, eager, inputs, dy, floors=(2, 5))


def benchmark_dropout_add_layer_norm(args, dtype: str) -> list[dict[str, object]]:
    x, residual, dy = (torch.randn(args.rows, args.columns).to(DTYPES[dtype]) for _ in range(3))
    inputs = [x, residual, *(torch.randn(args.columns).to(x.dtype) for _ in range(2))]
    seed = torch.tensor([0])

    def ours(x, residual, weight, bias, seed=None, backend=None):
        return fastbert.dropout_add_layer_norm(x, residual, weight, bias, EPS, DROPOUT, seed, backend=backend)

    def eager(x, residual, weight, bias):
        return F.layer_norm(residual + F.dropout(x, DROPOUT), x.shape[-1:], weight, bias, EPS)

    # torch draws other masks: the baseline is the twin in plain PyTorch, which draws ours.
    def twin(*inputs):
        return ours(*inputs, seed=seed, backend="reference")

    results = (
        run(lambda *inputs: ours(*inputs, seed=seed), inputs, dy),
        run(twin, inputs, dy),
        run(twin, [v.double() for v in inputs], dy),
    )
    for what, *values in zip(("y", "dx", "dresidual", "dweight", "dbias"), *results, strict=True):
        assert_close(*values, what=what)
    return measure({"op": "dropout_add_layer_norm", "dtype": dtype}, args, ours, eager, inputs, dy, floors=(4, 8))


if __name__ == "__main__":
    main()
