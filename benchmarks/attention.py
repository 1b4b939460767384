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
from collections.abc import Callable, Sequence

import torch
from timing import interleaved, results_path, write_csv
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert.backends.linear import bfloat16_products
from fastbert.testing import assert_close, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS, SIZE = 12, 64
CASES = [(16, 128, 0.1, True), (16, 128, 0.0, False), (2, 512, 0.0, False), (4, 512, 0.1, True)]


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
        for case in CASES:
            rows += benchmark(*case, dtype, args)
    write_csv(results_path("attention"), rows)


def benchmark(
    batch: int, longest: int, dropout: float, ragged: bool, dtype: str, args: argparse.Namespace
) -> list[dict[str, object]]:
    lengths = torch.linspace(longest / 4 if ragged else longest, longest, batch).long()
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = int(lengths.sum())
    qkv = torch.randn(tokens, 3, HEADS, SIZE).to(DTYPES[dtype])
    dout = torch.randn(tokens, HEADS, SIZE).to(qkv.dtype)
    padded = torch.randn(3, batch, HEADS, longest, SIZE).to(qkv.dtype).unbind(0)
    dpadded = torch.randn(batch, HEADS, longest, SIZE).to(qkv.dtype)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None] if ragged else None

    def ours(qkv: Tensor, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
        return fastbert.attention_qkv(qkv, cu_seqlens, longest, dropout_p=dropout, seed=seed, backend=backend)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    verify(ours, qkv, dout)
    calls = {"ours": (ours, (qkv,), dout), "torch": (theirs, padded, dpadded)}
    if not args.no_compile:
        torch.compiler.reset()
        calls["torch.compile"] = (torch.compile(theirs, dynamic=False), padded, dpadded)
    squares = int((lengths**2).sum()) * HEADS * SIZE
    elements = tokens * HEADS * SIZE * qkv.element_size()
    name = f"{batch} x {longest}{' ragged' if ragged else ''}, dropout {dropout}"
    case = {"case": name, "dtype": dtype}
    forward = {k: no_grad(*call[:2]) for k, call in calls.items()}
    both = {k: with_grad(*call) for k, call in calls.items()}
    return [
        *measure(case | {"pass": "forward"}, forward, 4 * squares, 4 * elements + 4 * tokens * HEADS, args.repeats),
        *measure(
            case | {"pass": "forward+backward"}, both, 14 * squares, 12 * elements + 16 * tokens * HEADS, args.repeats
        ),
    ]


def verify(ours: Callable[..., Tensor], qkv: Tensor, dout: Tensor) -> None:
    """torch draws other masks: the baseline is the twin in plain PyTorch, which draws ours."""
    seed = torch.tensor([0])

    def twin(qkv: Tensor) -> Tensor:
        return ours(qkv, seed, "reference")

    results = (
        run(lambda x: ours(x, seed), [qkv], dout),
        run(twin, [qkv], dout),
        run(twin, [qkv.double()], dout.double()),
    )
    for what, *values in zip(("out", "dqkv"), *results, strict=True):
        assert_close(*values, what=what)


def no_grad(op: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return op(*inputs)

    return call


def with_grad(op: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(op(*leaves), leaves, dy)


def measure(
    case: dict[str, object], calls: dict[str, Callable[[], object]], operations: int, size: int, repeats: int
) -> list[dict[str, object]]:
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
