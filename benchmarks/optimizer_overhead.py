"""What an optimizer's step costs beside its arithmetic: BERT base's 199 parameters with 8 numbers each.

    python benchmarks/optimizer_overhead.py [--threads 1 2] [--repeats 200]

LazyAdam with dense gradients against torch.optim.AdamW, fused and as it comes. First, after 5 steps of a decaying
learning rate, all three must have the same weights but for a rounding of each step. Then the steps are timed in turn in
one process; `ratio` is the median over LazyAdam's, so that 2 means twice as long.
"""

import argparse

import torch
from timing import interleaved, results_path, write_csv
from torch import nn

import fastbert

WEIGHT_DECAY = 0.01
OPTIMIZERS = {
    "fastbert.LazyAdam": lambda params: fastbert.LazyAdam(params, weight_decay=WEIGHT_DECAY),
    "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, weight_decay=WEIGHT_DECAY, fused=True),
    "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, weight_decay=WEIGHT_DECAY),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows += [{"step_threads": threads, **row} for row in benchmark(args.repeats)]
    write_csv(results_path("optimizer-overhead"), rows)


def parameters() -> list[nn.Parameter]:
    """As many as BERT base has, each with as many axes as there, and a gradient."""
    axes = [2, 2, 2, 1, 1]  # embeddings and their LayerNorm
    axes += 12 * [*4 * [2, 1], 1, 1, *2 * [2, 1], 1, 1]  # layers: attention, LayerNorm, feed-forward, LayerNorm
    axes += [2, 1]  # pooler
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in axes:
        shape = (4, 2) if count == 2 else (8,)
        made.append(nn.Parameter(torch.randn(shape, generator=generator)))
        made[-1].grad = torch.randn(shape, generator=generator)
    return made


def check() -> None:
    """Raises unless all optimizers go the same way."""
    ended = []
    for make in OPTIMIZERS.values():
        params = parameters()
        optimizer = make(params)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
        ended.append(torch.cat([param.detach().flatten() for param in params]))
    for other in ended[1:]:
        torch.testing.assert_close(ended[0], other, rtol=5 * 2**-23, atol=1e-7)


def benchmark(repeats: int) -> list[dict[str, object]]:
    check()
    stats = interleaved({name: make(parameters()).step for name, make in OPTIMIZERS.items()}, repeats)
    ours = stats["fastbert.LazyAdam"].median
    rows = []
    for name, its in stats.items():
        rows.append({"optimizer": name, "parameters": len(parameters()), "ms": its.median * 1e3, "p20": its.p20 * 1e3})
        rows[-1] |= {"p80": its.p80 * 1e3, "ratio": its.median / ours}
        print(f"{torch.get_num_threads()} threads  {name:<32}{its.median * 1e3:8.3f} ms  {its.median / ours:5.2f}")
    return rows


if __name__ == "__main__":
    main()
