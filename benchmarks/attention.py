"""Attention on packed sequences against torch's `scaled_dot_product_attention` on the same sequences padded.

    python benchmarks/attention.py [--dtypes float32 bfloat16] [--repeats 15] [--no-compile]

Cases: the lengths of a batch evenly spaced from a quarter of the longest to all of it, with dropout 0.1; and full
length without dropout. Counted are the products that the real tokens need: 4 S^2 D for each head and sequence of S
tokens forward, 14 S^2 D forward and backward. They are held against the rate of torch's own 2048^3 product in the same
dtype, in float32 where the processor has no bfloat16 products. We take one packed projection, torch q, k and v. The
bytes that must move are 4TNDe + 4TN forward and 12TNDe + 16TN in both. Values and gradients are checked against
float64, with our dropout mask, before anything is timed. Variants run in turn in one process, under the same allocator
setting.
"""

import argparse
from collections.abc import Mapping

import torch
from bandwidth import DTYPES, Row, judged
from timing import interleaved, results_path, write_csv

import fastbert
from fastbert.backends.linear import bfloat16_products
from fastbert.bench.plan import SHAPES
from fastbert.bench.problem import PASSES
from fastbert.bench.products import attention, lengths_of
from fastbert.bench.timing import Call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of every variant")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        for case in SHAPES["cpu"]["attention"]:
            rows += benchmark(*case, dtype, args)
    write_csv(results_path("attention"), rows)


def benchmark(
    batch: int, longest: int, dropout: float, ragged: bool, dtype: str, args: argparse.Namespace
) -> list[Row]:
    problem = attention(lengths_of(batch, longest, ragged), dropout, DTYPES[dtype])
    variants, rows = judged(problem, not args.no_compile), []
    for direction, operations, size in zip(PASSES, problem.flops, problem.sizes, strict=True):
        calls = {name: variant.call(direction) for name, variant in variants.items()}
        case = {"case": problem.shape, "dtype": dtype, "pass": direction}
        rows += measure(case, calls, operations, size, args.repeats)
    return rows


def measure(case: Row, calls: Mapping[str, Call], operations: int, size: int, repeats: int) -> list[Row]:
    dtype = DTYPES[str(case["dtype"])] if bfloat16_products else torch.float32
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    stats = interleaved({"matmul": lambda: a @ b, **calls}, repeats=repeats)
    peak = 2 * 2048**3 / stats.pop("matmul").median
    rows = []
    for name, taken in stats.items():
        row = {
            **case,
            "variant": name,
            "p20_ms": round(taken.p20 * 1e3, 4),
            "median_ms": round(taken.median * 1e3, 4),
            "p80_ms": round(taken.p80 * 1e3, 4),
            "gflop_per_s": round(operations / taken.median / 1e9, 1),
            "share_of_matmul": round(operations / taken.median / peak, 3),
            "floor_bytes": size,
            "time_over_ours": round(taken.median / stats["ours"].median, 2),
        }
        print(
            f"{' '.join(str(value) for value in case.values()):56} {name:14} {row['median_ms']:9.3f} ms "
            f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] {row['gflop_per_s']:7.1f} GFLOP/s "
            f"{row['share_of_matmul']:6.0%} of matmul  {row['time_over_ours']:6.2f} x ours",
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
