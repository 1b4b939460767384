"""Tokens per second of one pretraining step: ours against transformers' BERT or ALBERT, eager and compiled.

    python benchmarks/pretrain.py [--model bert] [--quick] [--layers 4] [--batch 8] [--seq-len 128] [--shortest 1] ...

A step is forward, backward, clipping of the gradient norm and the optimizer's step, with dropout 0.1, in float32 and in
bfloat16 autocast. The lengths of a batch's sequences are evenly spaced from `shortest` (1: half of the batch is
padding) to `seq_len`, and only real tokens are counted. transformers gets them padded to [B, S], which is what it
takes; its shapes never change, so torch.compile specialises it fully. We get the same tokens packed. Both sides have
the same weights, data, labels (15 % of the real tokens, and a label of every pair) and memory allocator setting, and
their losses without dropout are compared before anything is timed. Variants run in turn in one process. Our optimizer
is LazyAdam, on all rows of the word embeddings (as `fastbert pretrain`) or on the touched ones; transformers' is
torch's fused AdamW. On a GPU "fastbert captured" is the step of `fastbert pretrain --bf16`, one CUDA graph, "fastbert
launched" the same without the graph, and "plain torch captured" what torch alone can do (plain_bert.py), its losses
compiled in "plain torch compiled captured"; steps are timed ten in a row there, as they follow each other in training,
where a captured one's batch is brought while the step before runs. With --model albert there is "fastbert BERT"
besides, our BERT with the same layers. --memory adds the most memory that a process of each variant alone had, and the
size of its optimizer's state.
"""

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from plain_bert import PlainStep
from timing import Stats, interleaved, machine, results_path, write_csv
from torch import Tensor

import fastbert
from fastbert.bench.step import CLIP, LEARNING_RATE, WEIGHT_DECAY, Batch, make_batch, models, step, verify
from fastbert.models.auto import PRETRAINING
from fastbert.models.config import ModelConfig
from fastbert.models.pretraining import PreTrainingModel
from fastbert.models.working import WorkingCopy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def on_cpu(inputs: dict) -> dict:
    """As a data loader gives them, with the positions that the plain model asks for."""
    bounds = inputs["cu_seqlens"].cpu()
    places = torch.cat([torch.arange(int(size), device="cpu") for size in bounds.diff()])
    moved = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return moved | {"position_ids": places}


def captured_step(name: str, model: PreTrainingModel, inputs: list[dict]) -> Callable[[], None]:
    """One training step per call as `fastbert pretrain --bf16` takes it on a GPU, or the plain one, as one CUDA graph.

    "fastbert launched" is that of "fastbert captured", its kernels launched one by one.
    """
    model.train()
    if name.startswith("plain"):
        step = optimizing = PlainStep(model, LEARNING_RATE, CLIP, is_compiled="compiled" in name)
    else:
        optimizing = fastbert.LazyAdam(
            model.parameters(), lr=torch.tensor(LEARNING_RATE, dtype=torch.float64), weight_decay=WEIGHT_DECAY
        )
        working = WorkingCopy(model, optimizing)

        def step(batch: dict) -> Tensor:
            loss = working.model(**batch).loss
            loss.backward()
            working.hand_over_gradients()
            _, factor = optimizing.clip_factor(CLIP)
            optimizing.step(grad_factor=factor)
            optimizing.zero_grad()
            return loss.detach()

    captured = fastbert.capture(step, inputs[0], warmup=None if name.endswith("launched") else 3)
    taken = 0

    def call() -> None:
        nonlocal taken
        captured(inputs[taken % len(inputs)])
        taken += 1

    for _ in range(5):  # the capture is no step to time
        call()
    call.optimizer = getattr(optimizing, "optimizer", optimizing)
    return call


def in_a_row(call: Callable[[], None], steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            call()

    return run


def memory(variant: str, dtype: str) -> dict[str, float]:
    """Megabytes of a process that takes steps of this variant alone: the most it had, and its optimizer's state."""
    command = [sys.executable, *sys.argv, "--variants", variant, "--dtype", dtype, "--alone"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(("peak_mb", "optimizer_mb"), map(float, printed.split()[-2:]), strict=True))


def alone(call: Callable[[], None]) -> None:
    """Two steps, of which the first makes the optimizer's state, and a line of what `memory` reads."""
    call()
    call()
    state = sum(x.nbytes for slots in call.optimizer.state.values() for x in slots.values() if isinstance(x, Tensor))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, state / 1e6)  # Linux counts kilobytes


def variants(batches: dict[str, list[Batch]], dtype: torch.dtype, options: argparse.Namespace) -> dict:
    """Name -> one training step; every variant trains a model of its own."""
    chosen = {}
    for name in options.variants:
        kind = "bert" if name == ANOTHER else options.model
        padded, packed = [batch.padded for batch in batches[kind]], [batch.packed for batch in batches[kind]]
        ours, theirs = models(configuration(kind, options), options.attention, options.device)
        a, b = verify(ours, theirs, batches[kind][0], dtype)
        print(f"{dtype}: losses without dropout {a:.6f} (ours) and {b:.6f} (theirs)")
        if name in CAPTURED:
            if dtype == torch.bfloat16:
                chosen[name] = captured_step(name, ours, [on_cpu(batch) for batch in packed])
            continue
        is_ours = name.startswith("fastbert")
        model, inputs = (ours, packed) if is_ours else (theirs, padded)
        run = torch.compile(model, mode=options.compile_mode) if name.endswith("compiled") else model
        rows = ("touched" if "touched" in name else "all") if is_ours else ""
        chosen[name] = step(model, run, inputs, dtype, rows)
    return chosen


VARIANTS = ("fastbert", "fastbert touched rows", "fastbert compiled", "transformers eager", "transformers compiled")
# bfloat16 on a GPU, by fastbert.capture
CAPTURED = ("fastbert captured", "fastbert launched", "plain torch captured", "plain torch compiled captured")
ANOTHER = "fastbert BERT"  # beside ALBERT
STEPS = 10  # timed at once on a GPU


def configuration(model: str, options: argparse.Namespace) -> ModelConfig:
    kind = PRETRAINING[model].config_class
    dropouts = [field.name for field in dataclasses.fields(kind) if field.name.endswith("dropout_prob")]
    return kind.preset(
        options.preset,
        num_hidden_layers=options.layers,
        vocab_size=options.vocab_size,
        max_position_embeddings=max(512, options.seq_len),
        **dict.fromkeys(dropouts, options.dropout),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRETRAINING), default="bert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preset", default="base", help="width, heads and feed-forward size of this one's")
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=1, help="tokens of the shortest sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *CAPTURED, ANOTHER), help="all, if not given")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--tag", default="", help="in the name of the CSV file, of runs that differ in their variants")
    parser.add_argument("--no-keep-memory", action="store_true", help="leave the allocator as glibc has it")
    parser.add_argument("--memory", action="store_true", help="measure that too, on Linux")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the process that `memory` starts
    parser.add_argument("--quick", action="store_true", help="tiny model, three repeats, no CSV: does it run?")
    options = parser.parse_args()
    if options.variants is None:
        options.variants = [*VARIANTS, *([ANOTHER] if options.model == "albert" else [])]
    if options.quick:
        options.preset, options.layers, options.vocab_size, options.repeats = "tiny", 2, 1000, 3
    return options


def main() -> None:
    options = parse()
    kept = not options.no_keep_memory and fastbert.keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes, batches = (options.batch, options.seq_len, options.vocab_size), {}
    for model in {options.model, "bert"}:
        generator, label = torch.Generator().manual_seed(0), PRETRAINING[model].sentence_label
        made = [make_batch(*sizes, generator, options.shortest, label) for _ in range(4)]
        batches[model] = [batch.to(options.device) for batch in made]
    torch.set_default_device(options.device)
    tokens = batches[options.model][0].tokens
    share = tokens / (options.batch * options.seq_len)
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, memory kept: {kept}")
    print(
        f"{options.model.upper()} {options.preset}, {options.layers} layers; {options.batch} x {options.seq_len}, "
        f"{share:.0%} real tokens"
    )

    backend = options.device if options.device in fastbert.backends() else "reference"
    rows = []
    for name in options.dtype:
        calls = variants(batches, DTYPES[name], options)
        if options.alone:
            return alone(calls[options.variants[0]])
        steps = 1 if options.device == "cpu" else STEPS
        measured = interleaved({name: in_a_row(call, steps) for name, call in calls.items()}, options.repeats)
        stats = {variant: Stats(s.p20 / steps, s.median / steps, s.p80 / steps) for variant, s in measured.items()}
        eager = stats.get("transformers eager")
        print(f"\n{name:<30}{'p20':>9}{'median':>9}{'p80':>9} ms{'tokens/s':>12}{'x eager':>9}")
        for variant, s in stats.items():
            speed, ratio = tokens / s.median, eager.median / s.median if eager else None
            times = "".join(f"{1e3 * x:>9.1f}" for x in (s.p20, s.median, s.p80))
            had = memory(variant, name) if options.memory else {}
            shown = "".join(f"   {title.removesuffix('_mb')} {x:,.0f} MB" for title, x in had.items())
            times_eager = "" if ratio is None else f"{ratio:.2f}"
            print(f"{variant:<30}{times}   {speed:>12,.0f}{times_eager:>9}{shown}")
            rows.append({
                "variant": variant, "dtype": name, "p20_s": s.p20, "median_s": s.median, "p80_s": s.p80,
                "tokens": tokens, "tokens_per_s": speed, "times_transformers_eager": ratio, **had,
                "model": options.model, "preset": options.preset,
                "layers": options.layers, "batch": options.batch, "seq_len": options.seq_len,
                "shortest": options.shortest, "vocab_size": options.vocab_size, "dropout": options.dropout,
                "repeats": options.repeats,
                "attention": options.attention, "backend": backend, "memory_kept": kept,
                "transformers": transformers.__version__,
            })  # fmt: skip
        torch.compiler.reset()
    if not options.quick:
        what = [*([] if options.model == "bert" else [options.model]), *options.dtype]
        if options.device != "cpu":  # runs of several shapes on one day
            what += [options.preset, f"{options.batch}x{options.shortest}-{options.seq_len}"]
            what += [options.tag] if options.tag else []
        write_csv(results_path("pretrain", *what), rows)


if __name__ == "__main__":
    main()
