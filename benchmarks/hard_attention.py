"""Hard attention against its twin in plain PyTorch, and against our soft attention, on the same packed batch.

    python benchmarks/hard_attention.py [--dtypes float32 bfloat16] [--repeats 10]

12 heads of 64, sequences of one length. The kernel has as many products as soft attention: one of queries and keys
forward, where soft attention has a second one, and four backward, where that has five; noise takes two logarithms a
score. Outputs and gradients are checked against the twin in float64 before anything is timed. Variants run in turn in
one process, forward and backward, under the same allocator setting.
"""

import argparse
from collections.abc import Callable

import torch
from timing import interleaved, results_path, write_csv
from torch import Tensor

import fastbert
from fastbert.testing import assert_close, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS, SIZE = 12, 64
CASES = [(16, 128), (4, 512)]  # sequences, tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of every variant")
    args = parser.parse_args()
    fastbert.keep_memory()
    torch.manual_seed(0)
    rows = [row for dtype in args.dtypes for case in CASES for row in benchmark(*case, dtype, args.repeats)]
    write_csv(results_path("hard_attention"), rows)


def benchmark(sequences: int, length: int, dtype: str, repeats: int) -> list[dict[str, object]]:
    cu_seqlens = torch.arange(0, sequences + 1, dtype=torch.int32) * length
    qkv, dout = torch.randn(sequences * length, 4, HEADS, SIZE).to(DTYPES[dtype]).split([3, 1], 1)

    def hard(gumbel: bool, backend: str | None = None) -> Callable[[Tensor], Tensor]:
        options = {"gumbel": gumbel, "seed": 7, "backend": backend}
        return lambda x: fastbert.hard_attention(*x.unbind(1), cu_seqlens, length, **options)

    for gumbel in (False, True):
        verify(hard(gumbel), hard(gumbel, "reference"), qkv, dout)
    calls = {
        "hard": hard(False),
        "gumbel": hard(True),
        "hard, plain PyTorch": hard(False, "reference"),
        "gumbel, plain PyTorch": hard(True, "reference"),
        "soft": lambda x: fastbert.attention_qkv(x, cu_seqlens, length),
    }
    stats = interleaved({name: lambda op=op: run(op, [qkv], dout) for name, op in calls.items()}, repeats, warmup=1)
    return [
        {
            "case": f"{sequences} x {length}",
            "dtype": dtype,
            "variant": name,
            "p20_ms": round(taken.p20 * 1e3, 3),
            "median_ms": round(taken.median * 1e3, 3),
            "p80_ms": round(taken.p80 * 1e3, 3),
            "time_over_hard": round(taken.median / stats["hard"].median, 2),
        }
        for name, taken in stats.items()
    ]


def verify(ours: Callable, twin: Callable, qkv: Tensor, dout: Tensor) -> None:
    """Where the two best scores are equal to the last places, another choice is none that is wrong: of out and dv
    those rows are looked at whose choice is the truth's.
    """
    results = run(ours, [qkv], dout), run(twin, [qkv], dout), run(twin, [qkv.double()], dout.double())
    (out, dqkv), (_, twin_dqkv), (true, true_dqkv) = results
    same = (out.double() - true).abs().amax(-1) < 0.05  # [T, N]
    assert same.float().mean() > 0.999, "choices differ"
    assert_close(dqkv[:, :2], twin_dqkv[:, :2], true_dqkv[:, :2], what="dq and dk")
    if same.all():
        assert_close(dqkv[:, 2], twin_dqkv[:, 2], true_dqkv[:, 2], what="dv")


if __name__ == "__main__":
    main()
