"""What a call costs beside its arithmetic: every op on 256 numbers, forward, and forward with backward.

    python benchmarks/overhead.py [--threads 1] [--rounds 400] [--calls 20]

Each op stands beside PyTorch's own, which is compiled C++ up to its autograd; ours is Python down to its kernel.
Results are checked against PyTorch's before anything is timed. The variants run in turn in bursts of `--calls`; the
time is that of the fastest burst, which no other process interrupted, and what is kept are the ratios: to PyTorch's op,
and to `F.layer_norm` in inference, the yardstick of all. The last line is an autograd.Function in Python that computes
nothing: the least that ours can take with backward.

Where the backend "cuda" runs, the same follows on the GPU: the time until a burst's last call returns, which waits for
no kernel. There a second set has no rows, so that nothing is launched and what is left is Python and PyTorch.
"""

import argparse
import time
from collections.abc import Callable

import torch
from timing import results_path, synchronize, write_csv
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert.backends import why_not

ROWS, COLUMNS, HEADS = 4, 64, 4


def attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, N, T, D] each
    return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)


def cases(device: str, rows: int) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """By op: ours, PyTorch's, and their inputs."""
    x, residual = torch.randn(2, rows, COLUMNS, device=device)
    weight, bias = torch.rand(2, COLUMNS, device=device)
    matrix, qkv = (
        torch.randn(*shape, device=device) for shape in ((COLUMNS, COLUMNS), (rows, 3, HEADS, COLUMNS // HEADS))
    )
    lengths, labels = torch.tensor([0, rows], dtype=torch.int32, device=device), torch.arange(rows, device=device)
    reduction = "mean" if rows else "sum"  # a mean over nothing is NaN in PyTorch, here 0
    return {
        "layer_norm": (
            fastbert.layer_norm, lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b, 1e-12), [x, weight, bias],
        ),
        "add_layer_norm": (
            fastbert.dropout_add_layer_norm,
            lambda x, r, w, b: F.layer_norm(x + r, (COLUMNS,), w, b, 1e-12),
            [x, residual, weight, bias],
        ),
        "gelu": (fastbert.gelu, lambda x, b: F.gelu(x + b), [x, bias]),
        "cross_entropy": (
            lambda x: fastbert.cross_entropy(x, labels, reduction=reduction),
            lambda x: F.cross_entropy(x, labels, reduction=reduction),
            [x],
        ),
        "attention_qkv": (lambda qkv: fastbert.attention_qkv(qkv, lengths, rows), attention, [qkv]),
        "linear": (fastbert.linear, F.linear, [x, matrix, bias]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = measured("cpu", ROWS, args.rounds, args.calls)
    if why_not("cuda") is None:
        for count in (ROWS, 0):
            results += measured("cuda", count, args.rounds, args.calls)
    write_csv(results_path("overhead"), results)


def measured(device: str, count: int, rounds: int, calls: int) -> list[dict]:
    """Times every op on so many rows; prints and gives a line for each direction."""
    rows, yardstick, its_cases = [], None, cases(device, count)
    print(f"{device}, {count} rows")
    print(f"{'op':<16}{'direction':<20}{'ours us':>9}{'torch us':>10}{'ratio':>8}{'to layer_norm':>15}")
    for op, (ours, theirs, inputs) in its_cases.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        check(ours, theirs, leaves)
        for direction, both in (
            ("forward", [with_arguments(f, inputs) for f in (ours, theirs)]),
            ("forward + backward", [with_backward(f, leaves) for f in (ours, theirs)]),
        ):
            mine, torchs = fastest(both, rounds, calls)
            yardstick = yardstick or torchs  # F.layer_norm in inference comes first
            row = {
                "op": op, "direction": direction, "device": device, "rows": count, "ours_us": round(mine, 2),
                "torch_us": round(torchs, 2), "ratio": round(mine / torchs, 2),
                "ratio_to_layer_norm": round(mine / yardstick, 2),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{op:<16}{direction:<20}{mine:>9.2f}{torchs:>10.2f}{row['ratio']:>8}{row['ratio_to_layer_norm']:>15}"
            )
    leaves = [x.clone().requires_grad_() for x in its_cases["layer_norm"][2]]
    (empty,) = fastest([with_backward(Empty.apply, leaves)], rounds, calls)
    print(f"{'empty Function':<16}{'forward + backward':<20}{empty:>9.2f}\n")
    name, direction = "empty autograd.Function", "forward + backward"
    return [*rows, {"op": name, "direction": direction, "device": device, "rows": count, "ours_us": round(empty, 2)}]


class Empty(torch.autograd.Function):
    """What any Function in Python costs that has LayerNorm's three inputs, and computes nothing."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors


def with_arguments(function: Callable, inputs: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: function(*inputs)


def with_backward(function: Callable, leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    dy = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def check(ours: Callable, theirs: Callable, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours(*leaves), theirs(*leaves))
    for a, b in zip(with_backward(ours, leaves)(), with_backward(theirs, leaves)(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def fastest(variants: list[Callable], rounds: int, calls: int) -> list[float]:
    """Microseconds of a call in each variant's fastest burst."""
    best = [float("inf")] * len(variants)
    for _ in range(rounds):
        for i, call in enumerate(variants):
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / calls * 1e6)
    return best


if __name__ == "__main__":
    main()
