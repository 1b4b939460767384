"""The norms within the layers beside each other: same text, seed, steps; batches of 4 and 64 sequences of 16 and 64.

    python benchmarks/norms.py --output runs/norms [--steps 250] [--threads 1] [--norms layer batch ...]

Every training is one run of masked words on film reviews by `fastbert pretrain`'s loop, kept in --output, in a folder
for these steps and reviews: called again, the script does what is left. A batch of 4 times 64 tokens holds at least
four sequences, as some are shorter. Held-out loss is in evaluation mode, where batch and switchable norm use their
running statistics; the loss in training, where they use the batch's own, is the mean over the last tenth of the steps.

It writes a CSV file with a line per training and a picture of the held-out losses beside it.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, get_args

import torch
from reviews import reviews
from timing import results_path, write_csv

import fastbert
from fastbert.data.shards import is_store
from fastbert.models.config import Norm
from fastbert.prepare import PrepareConfig, prepare
from fastbert.pretrain import pretrain
from fastbert.pretrain.report import read_metrics
from fastbert.pretrain.settings import PretrainConfig

BATCHES = [(4, 16), (4, 64), (64, 16), (64, 64)]  # sequences and tokens of each
EVALUATIONS, EVALUATED_TOKENS = 8, 1 << 14
RATE = 1e-3


def make_store(folder: Path, every: int) -> Path:
    """A token store of every so many-th review, made where it is not there."""
    text, store = folder / "reviews.txt", folder / "store"
    if not is_store(store):
        with open(reviews(), newline="", encoding="utf-8") as file:
            texts = [" ".join(row["text"].split()) for row in csv.DictReader(file)][::every]
        text.write_text("\n\n".join(texts), encoding="utf-8")
        prepare(PrepareConfig(text, store, vocab_size=2048, workers=1))
    return store


def train(options: argparse.Namespace, store: Path, norm: Norm, sequences: int, tokens: int) -> dict[str, Any]:
    """One run, or what is left of it: its last scores and its curve."""
    folder = options.output / f"{norm}-{sequences}x{tokens}"
    config = PretrainConfig(
        output=folder, store=store, objective="mlm", norm=norm, dropout=0.0, seq_len=tokens, lr=RATE,
        batch_tokens=sequences * tokens, steps=options.steps, evaluations=EVALUATIONS, linear="torch",
        evaluation_batches=EVALUATED_TOKENS // (sequences * tokens), log_every=1, max_position_embeddings=64,
    )  # fmt: skip
    if not (folder / "model").exists():
        print(f"\n{norm}: {sequences} sequences of {tokens} tokens", flush=True)
        pretrain(config, resume=(folder / "config.json").exists())
    records = read_metrics(folder / "metrics.jsonl")
    curve = [(r["step"], r["held_out/mlm_loss"]) for r in records if "held_out/mlm_loss" in r]
    trained = [r["mlm_loss"] for r in records if "mlm_loss" in r][-options.steps // 10 :]
    words_alone = next(r["held_out/frequency_loss"] for r in records if "held_out/frequency_loss" in r)
    return {
        "norm": norm, "sequences": sequences, "tokens": tokens, "steps": options.steps, "learning_rate": RATE,
        "held_out_loss": curve[-1][1], "training_loss": sum(trained) / len(trained), "frequency_loss": words_alone,
        "curve": curve,
    }  # fmt: skip


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over the steps, a panel for each kind of batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    for (sequences, tokens), axes in zip(BATCHES, panels.flat, strict=True):
        own = [run for run in runs if (run["sequences"], run["tokens"]) == (sequences, tokens)]
        for number, run in enumerate(own):
            steps, losses = zip(*run["curve"], strict=True)
            axes.plot(steps, losses, label=run["norm"], color=f"C{number}", linewidth=1.4)
        if own:
            axes.axhline(own[0]["frequency_loss"], color="0.6", linestyle="--", linewidth=0.8, label="words' frequency")
        axes.set(title=f"{sequences} sequences of {tokens} tokens", ylabel="held-out loss, nats per masked token")
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("steps")
    panels[0, 0].legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=5, help="of so many reviews one is read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--norms", nargs="*", choices=get_args(Norm), default=get_args(Norm))
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.output /= f"{options.steps}-steps-of-every-{options.every}"
    options.output.mkdir(parents=True, exist_ok=True)
    fastbert.keep_memory()
    torch.set_num_threads(options.threads)
    store = make_store(options.output, options.every)
    runs = [train(options, store, norm, *batch) for batch in BATCHES for norm in options.norms]
    print(f"\n{'norm':12}{'sequences':>10}{'tokens':>8}{'held-out loss':>15}{'in training':>13}")
    for run in runs:
        print(
            f"{run['norm']:12}{run['sequences']:>10}{run['tokens']:>8}{run['held_out_loss']:>15.3f}"
            f"{run['training_loss']:>13.3f}"
        )
    if len(options.norms) == len(get_args(Norm)):
        path = results_path("norms", "tiny")
        write_csv(path, [{name: x for name, x in run.items() if name != "curve"} for run in runs])
        draw(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
