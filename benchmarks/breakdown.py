"""Where the time of one pretraining step goes: milliseconds by kind of work, from torch's profiler.

    python benchmarks/breakdown.py [--dtype float32 bfloat16] [--layers 4] [--batch 32] [--seq-len 128] [--shortest 1]

The step is that of `benchmarks/pretrain.py`: forward, backward, clipping and LazyAdam on all rows. Steps are first
timed without the profiler, then profiled; what an operator itself took on the CPU is summed over its kind. The
profiler's own memory moves the allocator's, so that large copies and fills may fault pages there and not in a step
without it: the sum is printed beside the step's own time.
"""

import argparse
import statistics
import time

import torch
from pretrain import DTYPES, make_batch, step
from timing import results_path, write_csv
from torch.profiler import ProfilerActivity, profile, schedule

import fastbert
from fastbert.models.bert import BertConfig, BertForPreTraining

STEPS = 4
KINDS = {
    "products": (
        "aten::mm",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
        "fastbert::linear_forward",
        "fastbert::linear_backward",
    ),
    "attention": ("fastbert::attention_forward", "fastbert::attention_backward"),
    "LayerNorm": ("fastbert::layer_norm_forward", "fastbert::layer_norm_backward"),
    "GELU": ("fastbert::gelu_forward", "fastbert::gelu_backward"),
    "cross entropy": ("fastbert::cross_entropy_forward", "fastbert::cross_entropy_backward"),
    "optimizer": ("Optimizer.step#LazyAdam.step",),
    "gradient norm": ("aten::linalg_vector_norm",),
    "casts and copies": ("aten::copy_", "aten::fill_", "aten::cat"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--preset", default="base")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=1, help="tokens of the shortest sequence")
    options = parser.parse_args()
    fastbert.keep_memory()
    rows = [row for dtype in options.dtype for row in breakdown(dtype, options)]
    write_csv(results_path("breakdown"), rows)


def breakdown(dtype: str, options: argparse.Namespace) -> list[dict[str, object]]:
    torch.manual_seed(0)
    config = BertConfig.preset(options.preset, num_hidden_layers=options.layers, vocab_size=options.vocab_size)
    generator = torch.Generator().manual_seed(0)
    sizes = options.batch, options.seq_len, options.vocab_size
    batches = [make_batch(*sizes, generator, options.shortest) for _ in range(2)]
    model = BertForPreTraining(config)
    call = step(model, model, [batch.packed for batch in batches], DTYPES[dtype], "all")
    seconds = []
    for _ in range(3 + 5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    alone = 1e3 * statistics.median(seconds[3:])

    taken: dict[str, float] = {}

    def read(profiler: profile) -> None:
        for event in profiler.key_averages():
            if not event.key.startswith("ProfilerStep"):
                taken[event.key] = event.self_cpu_time_total / 1e3 / STEPS

    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=STEPS, active=STEPS, repeat=1),
        on_trace_ready=read,
    ) as profiler:
        for _ in range(2 * STEPS + 1):
            call()
            profiler.step()
    by_kind = {kind: sum(taken.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    total = sum(taken.values())
    by_kind["the rest"] = total - sum(by_kind.values())
    print(f"{dtype}: {alone:.0f} ms a step, {batches[0].tokens} tokens; {total:.0f} ms under the profiler")
    for kind, ms in by_kind.items():
        print(f"  {kind:<18}{ms:9.1f} ms {ms / total:6.1%}")
    shared = {
        "dtype": dtype, "step_ms": round(alone, 1), "profiled_ms": round(total, 1), "tokens": batches[0].tokens,
        "preset": options.preset, "layers": options.layers, "batch": options.batch, "seq_len": options.seq_len,
        "shortest": options.shortest, "vocab_size": options.vocab_size,
    }  # fmt: skip
    return [{"kind": kind, "ms": round(ms, 2), "share": round(ms / total, 4), **shared} for kind, ms in by_kind.items()]


if __name__ == "__main__":
    main()
