"""ALBERT against BERT after equal times of training: same text, vocabulary, width and depth.

    python benchmarks/equal_time.py --output runs/equal_time [--minutes 10] [--seeds 3] [--threads 1] ...

How long a step takes is measured first, both models in turn in one process, and each is trained for as many steps as
the minutes hold; so a neighbour on the machine takes time from neither. Then each tries the learning rates for a third
of the minutes, with a seed of their own, and takes the one of the lowest held-out loss. Then come the seeds. BERT
learns masked words and next sentences (NSP), ALBERT masked words and the order of sentences (SOP), each token masked
for itself. Every training is one `fastbert pretrain`, kept in --output: called again, the script does what is left.

It writes a CSV file with a line per training and a picture beside it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from pretrain import DTYPES, make_batch, step
from reviews import reviews
from timing import interleaved, machine, results_path, write_csv

import fastbert
from fastbert.models.auto import PRETRAINING
from fastbert.pretrain.report import read_metrics

OBJECTIVES = {"bert": "mlm+nsp", "albert": "mlm+sop"}
PAIRS = {"bert": "nsp", "albert": "sop"}
SEED_OF_TRIALS = 100


def seconds_per_step(options: argparse.Namespace) -> dict[str, float]:
    """Of each model's training step, on packed batches of full sequences; kept in the folder."""
    path = options.output / "seconds_per_step.json"
    if path.exists():
        return json.loads(path.read_text())
    calls = {}
    for model, kind in PRETRAINING.items():
        size, label = options.batch_tokens // options.seq_len, kind.sentence_label
        config = kind.config_class.preset(options.preset, vocab_size=options.vocab_size)
        generator = torch.Generator().manual_seed(0)
        batch = make_batch(size, options.seq_len, options.vocab_size, generator, options.seq_len, label)
        made = kind(config)
        calls[model] = step(made, made, [batch.packed], DTYPES["bfloat16" if options.bf16 else "float32"], "all")
    seconds = {model: stats.median for model, stats in interleaved(calls, 20).items()}
    path.write_text(json.dumps(seconds) + "\n")
    return seconds


def train(options: argparse.Namespace, model: str, minutes: float, seed: int, rate: float, seconds: float) -> dict:
    """One `fastbert pretrain`, or what is left of it; its last scores on the held-out part and its curve."""
    folder = options.output / f"{model}-{'trial-' if seed == SEED_OF_TRIALS else ''}{rate:g}-seed{seed}"
    steps = round(60 * minutes / seconds)
    command = [
        sys.executable, "-m", "fastbert", "pretrain", "--output", folder, "--corpus", options.corpus,
        "--column", "text", "--model", model, "--objective", OBJECTIVES[model], "--preset", options.preset,
        "--dropout", 0, "--vocab-size", options.vocab_size, "--seq-len", options.seq_len,
        "--batch-tokens", options.batch_tokens,
        "--steps", steps, "--seed", seed, "--lr", rate, "--bf16" if options.bf16 else "--no-bf16",
    ]  # fmt: skip
    if not (folder / "model").exists():
        if (folder / "config.json").exists():
            command.append("--resume")
        print(f"\n{model}, seed {seed}, learning rate {rate:g}: {steps} steps, {minutes:g} minutes", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        subprocess.run([str(part) for part in command], env=environment, check=True)
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "held_out/mlm_loss" in record]
    scores = {name: records[-1][f"held_out/{name}"] for name in ("mlm_loss", "mlm_accuracy", "frequency_loss")}
    scores["pair_accuracy"] = records[-1][f"held_out/{PAIRS[model]}_accuracy"]
    curve = [
        (r["step"] * seconds / 60, r["held_out/mlm_loss"], r[f"held_out/{PAIRS[model]}_accuracy"]) for r in records
    ]
    return {"model": model, "seed": seed, "learning_rate": rate, "steps": steps, "minutes": minutes} | scores | {
        "seconds_per_step": seconds, "curve": curve,
    }  # fmt: skip


def draw(runs: list[dict], path: Path) -> None:
    """Held-out loss and accuracy of the pairs over the minutes, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    names = {"bert": "BERT, next sentence", "albert": "ALBERT, sentence order"}
    for run in runs:
        minutes, losses, accuracies = zip(*run["curve"], strict=True)
        label = names[run["model"]] if run["seed"] == 0 else None
        style = {"color": "C0" if run["model"] == "bert" else "C1", "linewidth": 1.2}
        loss.plot(minutes, losses, label=label, **style)
        accuracy.plot(minutes, accuracies, label=label, **style)
    accuracy.axhline(0.5, color="0.6", linestyle="--", linewidth=0.8)
    loss.set(xlabel="minutes of training", ylabel="nats per masked token", title="held-out loss, masked words")
    accuracy.set(xlabel="minutes of training", ylabel="share that is right", title="held-out accuracy, pairs")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    loss.legend()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--corpus", default=None, help="a table with a column text; the film reviews, if not given")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[7.5e-4, 1.5e-3, 3e-3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--models", nargs="*", choices=sorted(PRETRAINING), default=sorted(PRETRAINING))
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    options.corpus = options.corpus or reviews()
    fastbert.keep_memory()
    torch.set_num_threads(options.threads)
    seconds, runs = seconds_per_step(options), []
    print(", ".join(f"{model} {1e3 * x:.0f} ms a step" for model, x in seconds.items()))
    for model in options.models:
        trials = [
            train(options, model, options.minutes / 3, SEED_OF_TRIALS, rate, seconds[model])
            for rate in options.learning_rates
        ]
        print(model, *(f"{run['learning_rate']:g}: {run['mlm_loss']:.3f}" for run in trials))
        rate = min(trials, key=lambda run: run["mlm_loss"])["learning_rate"]
        runs += [train(options, model, options.minutes, seed, rate, seconds[model]) for seed in range(options.seeds)]
    print(f"\n{'':8}{'seed':>5}{'lr':>9}{'steps':>7}{'held-out loss':>15}{'accuracy':>10}{'of pairs':>10}")
    for run in runs:
        print(
            f"{run['model']:8}{run['seed']:>5}{run['learning_rate']:>9g}{run['steps']:>7}{run['mlm_loss']:>15.3f}"
            f"{run['mlm_accuracy']:>10.1%}{run['pair_accuracy']:>10.1%}"
        )
    if len(options.models) == len(PRETRAINING):
        path = results_path("equal_time", options.preset)
        settings = {
            name: getattr(options, name) for name in ("preset", "vocab_size", "seq_len", "batch_tokens", "bf16")
        }
        write_csv(path, [{name: x for name, x in run.items() if name != "curve"} | settings for run in runs])
        draw(runs, path.with_suffix(".png"))
        print(f"picture: {path.with_suffix('.png')} ({machine()['cpu']})")


if __name__ == "__main__":
    main()
