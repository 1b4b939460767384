"""Texts and what they are labelled with, from tables; what is wrong with them is said before anything is trained."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from fastbert.data.texts import Texts, read_texts
from fastbert.finetune.settings import TaskConfig

MANY = 0.5  # share of the rows with a class of their own from which they are no classes


class Examples(NamedTuple):
    """N labelled texts.

    Attributes:
        texts: the texts.
        targets: int64 [N], classes; float64 [N], numbers.
    """

    texts: Texts
    targets: Tensor

    def take(self, places: list[int]) -> "Examples":
        texts, pairs, labels = (x and [x[i] for i in places] for x in self.texts[1:])
        return Examples(Texts([self.texts.lines[i] for i in places], texts, pairs, labels), self.targets[places])


def read_examples(config: TaskConfig, known: Sequence[str] | None = None) -> tuple[Examples, Examples, list[str]]:
    """Examples to train and to evaluate on, and the classes; of a regression the column's name.

    Classes are in the order of their names, whole numbers in that of their values; or they are those `known` already.

    Raises:
        FileNotFoundError, ValueError: as `read_texts`; empty texts, labels that are missing, of one class only, of as
            many as there are texts, that are numbers where classes were asked for or no numbers where these were, or
            that are in one table alone.
    """
    tables = [path for path in (config.train, config.evaluate) if path is not None]
    read = {path: _read(path, config) for path in tables}
    if config.regression:
        classes = [config.label]
        examples = {path: Examples(texts, _numbers(path, texts)) for path, texts in read.items()}
        if len(set(examples[config.train].targets.tolist())) == 1:
            raise ValueError(f"all labels of {config.train} are the same number: there is nothing to learn from them")
    else:
        classes = _classes(config.train, read[config.train], config.label) if known is None else list(known)
        owner = f"text of {config.train}" if known is None else "class of the teacher"
        examples = {path: Examples(texts, _places(path, texts, classes, owner)) for path, texts in read.items()}
    if config.evaluate is not None:
        return examples[config.train], examples[config.evaluate], classes
    return *_split(examples[config.train], classes, config), classes


def _read(path: Path, config: TaskConfig) -> Texts:
    texts = read_texts(
        path, config.text, config.pair, config.label, separator=config.separator, quoting=config.quoting
    )  # fmt: skip
    for column, cells in ((config.text, texts.texts), (config.pair, texts.pairs), (config.label, texts.labels)):
        empty = [line for line, cell in zip(texts.lines, cells or [], strict=False) if not cell.strip()]
        if empty:
            raise ValueError(
                f"{path} has {len(empty):,} rows without anything in the column {column!r}, the first in line "
                f"{empty[0]:,}: fill them in or take those rows out"
            )
    return texts


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numbers(path: Path, texts: Texts) -> Tensor:
    numbers = [_number(label) for label in texts.labels]
    for line, label, number in zip(texts.lines, texts.labels, numbers, strict=True):
        if number is None:
            raise ValueError(
                f"{path}, line {line:,}: the label {label!r} is no number, as --regression asks for: mend it, or leave "
                "--regression out where the labels are classes"
            )
    return torch.tensor(numbers, dtype=torch.float64)


def _classes(path: Path, texts: Texts, column: str) -> list[str]:
    counts = Counter(texts.labels)
    if len(counts) == 1:
        raise ValueError(
            f"all labels in the column {column!r} of {path} are {texts.labels[0]!r}: a classifier needs two classes or "
            "more"
        )
    whole = [label for label in counts if label.removeprefix("-").isdecimal()]
    numbers = [label for label in counts if _number(label) is not None]
    if len(numbers) == len(counts) and len(whole) < len(counts):
        raise ValueError(
            f"the labels in the column {column!r} of {path} are numbers such as {_first(numbers, whole)!r}: pass "
            "--regression to predict them, or write classes as words or whole numbers"
        )
    if 0 < len(numbers) < len(counts):
        odd = min(numbers, key=counts.__getitem__)
        raise ValueError(
            f"{path}, line {texts.lines[texts.labels.index(odd)]:,}: the label {odd!r} is a number, and others are "
            f"words such as {_first(counts, numbers)!r}: mend it, or name the classes all by words"
        )
    if len(counts) > MANY * len(texts.labels):
        raise ValueError(
            f"the column {column!r} of {path} has {len(counts):,} different labels in {len(texts.labels):,} rows: a "
            "class needs several texts; name the right column (--label), or pass --regression for numbers"
        )
    return sorted(counts, key=int if len(whole) == len(counts) else str)


def _first(labels: list[str] | Counter[str], without: list[str]) -> str:
    return next(label for label in labels if label not in without)


def _places(path: Path, texts: Texts, classes: list[str], owner: str) -> Tensor:
    places = {label: i for i, label in enumerate(classes)}
    for line, label in zip(texts.lines, texts.labels, strict=True):
        if label not in places:
            raise ValueError(
                f"{path}, line {line:,}: no {owner} has the label {label!r}, those there are "
                f"{', '.join(map(repr, classes[:10]))}: mend it, or give examples of it to train on"
            )
    return torch.tensor([places[label] for label in texts.labels])


def _split(examples: Examples, classes: list[str], config: TaskConfig) -> tuple[Examples, Examples]:
    """A part to train on and one to evaluate on, with every class in both."""
    rows = len(examples.targets)
    held_out = max(1, round(config.held_out * rows))
    by_class = None
    if not config.regression:
        counts = torch.bincount(examples.targets, minlength=len(classes))
        if counts.min() < 2 or min(held_out, rows - held_out) < len(classes):
            rarest = classes[int(counts.argmin())]
            raise ValueError(
                f"{config.train} is too small to hold out {held_out} of {rows} rows with each of {len(classes)} "
                f"classes on either side (the rarest, {rarest!r}, has {counts.min()}): give more examples, another "
                "share (--held-out), or a table of their own (--evaluate)"
            )
        by_class = examples.targets.numpy()
    elif rows < 4:
        raise ValueError(f"{config.train} has {rows} rows, too few to train and to evaluate on: give more examples")
    train, evaluate = train_test_split(
        range(rows), test_size=held_out, random_state=config.seed % 2**32, stratify=by_class
    )
    return examples.take(sorted(train)), examples.take(sorted(evaluate))
