"""The products of BERT's linear layers: torch's own routine against others and frozen weights, as TFLOP/s.

    python benchmarks/linear.py [--rows 512 77] [--preset base] [--vocab-size 30522] [--dtypes float32] [--repeats 20]

Forward and backward take three products of M x N x K multiplications, M rows (tokens, or words to predict); frozen
weights have the forward pass only. Values and gradients are checked against float64 before anything is timed. All run
in turn in one process, under the same allocator setting. Where a product is too small for a library
(`fastbert.backends.linear.SMALL`), it is left out. bfloat16 is also computed in float32 ("widened", "fastbert").
"""

import argparse
import functools

import torch
from bandwidth import DTYPES
from timing import interleaved, results_path, write_csv
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert.backends import native
from fastbert.backends.linear import SMALL, onednn_missing
from fastbert.bench.problem import forward, forward_backward
from fastbert.models.bert import BertConfig
from fastbert.models.frozen import FrozenWeight
from fastbert.testing import assert_close, run

NAMES = ("y", "dx", "dweight", "dbias")
MISSING = {"onednn": onednn_missing, "fastbert": native.cpu_missing, "widened": None}


def by(library: str):
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with fastbert.use_linear(library):
            return fastbert.linear(x, weight, bias)

    return product


def benchmark(name: str, m: int, k: int, n: int, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    *inputs, dy = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
    others = [other for other, why in MISSING.items() if not why and m * k * n >= SMALL.get((other, dtype), 1 << 62)]
    ops = {library: by(library) for library in ("torch", *others)}
    truth = run(F.linear, [x.double() for x in inputs], dy.double())
    results = {library: run(op, inputs, dy) for library, op in ops.items()}
    for library in ops:
        for what, *values in zip(NAMES, results[library], results["torch"], truth, strict=True):
            assert_close(*values, what=f"{what} by {library}")
    x, weight, bias = inputs
    frozen = {}
    for library in ("onednn", "fastbert"):
        if not MISSING[library]:
            with fastbert.use_linear(library):
                frozen[f"{library} frozen"] = functools.partial(FrozenWeight(weight, dtype).product, x, bias)
    for what, call in frozen.items():
        assert_close(call(), results["torch"][0], truth[0], what=what)

    rows = []
    passes = {
        ("forward", 1): {library: forward(op, inputs) for library, op in ops.items()} | frozen,
        ("forward+backward", 3): {library: forward_backward(op, inputs, dy) for library, op in ops.items()},
    }
    for (what, products), calls in passes.items():
        stats = interleaved(calls, repeats=repeats)
        for library, taken in stats.items():
            row = {
                "layer": name, "dtype": str(dtype).removeprefix("torch."), "rows": m, "k": k, "n": n, "pass": what,
                "variant": library,
                "p20_ms": round(taken.p20 * 1e3, 3), "median_ms": round(taken.median * 1e3, 3),
                "p80_ms": round(taken.p80 * 1e3, 3),
                "tflop_per_s": round(2 * products * m * n * k / taken.median / 1e12, 4),
                "torch_time_over_this": round(stats["torch"].median / taken.median, 2),
            }  # fmt: skip
            print(
                f"{name:14} {row['dtype']:9} {m:5} x {k:5} x {n:5} {what:17} {library:15} {row['median_ms']:9.2f} ms "
                f"[{row['p20_ms']:.2f}, {row['p80_ms']:.2f}] {1e3 * row['tflop_per_s']:7.0f} GFLOP/s "
                f"{row['torch_time_over_this']:6.2f}x",
                flush=True,
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[512, 77], help="of the layers, and of the decoder")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    fastbert.keep_memory()
    torch.manual_seed(0)
    config, (tokens, words) = BertConfig.preset(args.preset), args.rows
    size, inner = config.hidden_size, config.intermediate_size
    layers = {
        "qkv": (tokens, size, 3 * size), "output": (tokens, size, size), "intermediate": (tokens, size, inner),
        "back": (tokens, inner, size), "decoder": (words, size, args.vocab_size),
    }  # fmt: skip
    rows = []
    for dtype in (DTYPES[name] for name in args.dtypes):
        for name, (m, k, n) in layers.items():
            rows += benchmark(name, m, k, n, dtype, args.repeats)
    write_csv(results_path("linear", *(args.dtypes if len(args.dtypes) < len(DTYPES) else [])), rows)


if __name__ == "__main__":
    main()
