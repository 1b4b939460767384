"""What the benchmarks of memory-bound ops share: the command line, times beside a copy of the bytes, the table."""

import argparse
from collections.abc import Callable, Iterable, Mapping

import torch
from timing import interleaved, results_path, write_csv

from fastbert.allocator import keep_memory
from fastbert.bench import rates
from fastbert.bench.problem import DTYPES as ALL
from fastbert.bench.problem import PASSES, Judge, Problem, Variant
from fastbert.bench.timing import Call

DTYPES = {name: ALL[name] for name in ("float32", "bfloat16")}
Row = dict[str, object]


def benchmark(
    stem: str, description: str, rows: int, columns: int, problems: Callable[..., Iterable[tuple[Row, Problem]]]
) -> None:
    """The script benchmarks/STEM.py, from its command line to its CSV file.

    Args:
        stem: of the op.
        description: of --help.
        rows, columns: the shape, unless the command line has another.
        problems: of rows, columns and a dtype makes what is measured, each beside the columns that name it.
    """
    args = arguments(description, rows, columns)
    keep_memory()
    torch.manual_seed(0)
    table = []
    for name in args.dtypes:
        for case, problem in problems(args.rows, args.columns, DTYPES[name]):
            table += measure({**case, "dtype": name}, problem, args.repeats, not args.no_compile)
    write_csv(results_path(stem), table)


def arguments(description: str, rows: int, columns: int) -> argparse.Namespace:
    """Shape, dtypes and effort from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--columns", type=int, default=columns)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of every variant")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


def judged(problem: Problem, is_compiled: bool) -> dict[str, Variant]:
    """The variants by the names of the tables; VerificationError where ours is wrong."""
    Judge(problem).ours()
    variants = {"ours": problem.ours, "torch": problem.torch}
    if is_compiled:
        torch.compiler.reset()
        theirs = problem.torch
        variants["torch.compile"] = Variant(torch.compile(theirs.function, dynamic=False), theirs.inputs, theirs.dy)
    return variants


def measure(case: Row, problem: Problem, repeats: int, is_compiled: bool) -> list[Row]:
    """Judges ours, then times each pass of every variant beside a copy of the bytes that must move.

    Args:
        case: columns that name it.
        problem: the op on its inputs.
        repeats: timed calls of every variant.
        is_compiled: whether torch.compile takes part.

    Returns:
        One row for each variant and pass.
    """
    variants, rows = judged(problem, is_compiled), []
    for direction, size in zip(PASSES, problem.sizes, strict=True):
        calls = {name: variant.call(direction) for name, variant in variants.items()}
        rows += _time({**case, "pass": direction}, size, calls, repeats)
    return rows


def _time(case: Row, size: int, calls: Mapping[str, Call], repeats: int) -> list[Row]:
    stats = interleaved({"copy": rates.copy(size), **calls}, repeats=repeats)
    rows = []
    for name, taken in stats.items():
        row = {
            **case,
            "variant": name,
            "p20_ms": round(taken.p20 * 1e3, 4),
            "median_ms": round(taken.median * 1e3, 4),
            "p80_ms": round(taken.p80 * 1e3, 4),
            "floor_bytes": size,
            "gb_per_s": round(size / taken.median / 1e9, 2),
            "share_of_copy": round(stats["copy"].median / taken.median, 3),
            "time_over_ours": round(taken.median / stats["ours"].median, 2),
        }
        print(
            f"{' '.join(str(value) for value in case.values()):44} {name:14} {row['median_ms']:9.3f} ms "
            f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] {row['gb_per_s']:7.1f} GB/s "
            f"{row['share_of_copy']:6.0%} of copy  {row['time_over_ours']:6.2f} x ours",
            flush=True,
        )
        rows.append(row)
    return rows
