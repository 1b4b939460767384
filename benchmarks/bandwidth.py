"""What the benchmarks of memory-bound ops share: inputs, calls to time, the copy they are held against, the table."""

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from timing import interleaved
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Op = Callable[..., Tensor]


def arguments(description: str, rows: int, columns: int) -> argparse.Namespace:
    """Shape, dtypes and effort from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--columns", type=int, default=columns)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of every variant")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


def forward(op: Op, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return op(*inputs)

    return call


def forward_backward(op: Op, inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(op(*leaves), leaves, dy)


def copy(size: int) -> Callable[[], object]:
    """A copy that moves `size` bytes, half of them read and half written."""
    source = torch.ones(size // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(
    case: Mapping[str, object],
    args: argparse.Namespace,
    ours: Op,
    eager: Op,
    inputs: Sequence[Tensor],
    dy: Tensor,
    floors: tuple[int, int],
) -> list[dict[str, object]]:
    """Times forward, then forward and backward, of ours, of torch and of torch.compile, beside a copy of the bytes.

    Args:
        case: columns that name the case.
        args: from `arguments`.
        ours, eager: the op on `inputs`.
        inputs: tensors that all need a gradient.
        dy: the gradient that flows back.
        floors: bytes that must move in the two passes, in units of the first input's size: every input once, every
            output once.

    Returns:
        One row for each variant and pass.
    """
    ops = {"ours": ours, "torch": eager}
    if not args.no_compile:
        torch.compiler.reset()
        ops["torch.compile"] = torch.compile(eager, dynamic=False)
    size = inputs[0].numel() * inputs[0].element_size()
    forwards = {name: forward(op, inputs) for name, op in ops.items()}
    both = {name: forward_backward(op, inputs, dy) for name, op in ops.items()}
    return [
        *_time({**case, "pass": "forward"}, floors[0] * size, forwards, args.repeats),
        *_time({**case, "pass": "forward+backward"}, floors[1] * size, both, args.repeats),
    ]


def _time(
    case: Mapping[str, object], size: int, calls: Mapping[str, Callable[[], object]], repeats: int
) -> list[dict[str, object]]:
    stats = interleaved({"copy": copy(size), **calls}, repeats=repeats)
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
