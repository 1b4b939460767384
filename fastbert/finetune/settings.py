"""What fine-tuning and prediction can be told, and what of it holds."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import torch
import tyro

from fastbert.backends import linear
from fastbert.data.tables import Quoting
from fastbert.pretrain.settings import check_device, expect

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "rmse"]
OF_CLASSES, OF_NUMBERS = ("accuracy", "f1", "matthews"), ("pearson", "spearman", "rmse")


def expect_number(name: str, value: object, low: float, high: float, or_none: bool = False) -> None:
    """Raises ValueError unless a setting is a number from `low` to `high`, or None where that may be."""
    holds = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    expect(holds or (value is None and or_none), name, f"from {low} to {high}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What training on a table of labelled texts can be told, whatever is trained: `finetune` and `distill` share it.

    A subclass has `train`, the table, `output`, the run's folder, and `dropout`, a probability or None.

    Attributes:
        command: the program that trains so.
        sources: names of the settings that are paths to what it reads.
    """

    command: ClassVar[str]
    sources: ClassVar[tuple[str, ...]]

    evaluate: Path | None = None
    """A table like the first, to evaluate on; if not given a part of the first."""
    held_out: float = 0.1
    """Without --evaluate: the share of the rows to evaluate on, drawn so that every class has its share."""

    text: str = "text"
    """The column with the text."""
    pair: str | None = None
    """The column with a second text, where a pair of texts has the label."""
    label: str = "label"
    """The column with the label."""
    regression: bool = False
    """The labels are numbers to be predicted, not classes."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double ("" for a quote within), backslash, none; auto looks at the header."""

    seq_len: int | None = None
    """Tokens at which texts are cut off; if not given what the model takes."""
    epochs: int = 5
    """Most passes over the rows."""
    patience: int = 2
    """Training ends after so many epochs that were no better than the best; that one's model is kept."""
    metric: Metric | None = None
    """Which score says what is best; if not given accuracy, with --regression pearson."""
    batch_size: int = 32
    """Rows of a step; they are packed without padding."""
    lr: float | None = None
    """Highest learning rate; if not given 5e-5 at BERT base's width 768, and inverse to the width; with --features
    1e-2."""
    warmup: float = 0.1
    """Share of the steps of all epochs in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """Decoupled; none on biases and LayerNorm, and of the word embeddings on the rows of a step's words alone."""
    clip: float = 1.0
    """Largest norm of the gradient that is applied."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights stay float32."""
    seed: int = 0
    """Of everything random."""
    snapshot_every: int = 1000
    """Steps between snapshots within an epoch, from which the run can be resumed; the end of an epoch, Ctrl-C and
    SIGTERM take one too."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    def check(self) -> None:
        """Raises ValueError with the rule, what came and what is expected, where a setting does not hold."""
        for name, low in (("epochs", 1), ("patience", 1), ("batch_size", 1), ("seed", 0), ("seq_len", 3),
                          ("snapshot_every", 1)):  # fmt: skip
            value = getattr(self, name)
            holds = (type(value) is int and low <= value < 2**31) or (name == "seq_len" and value is None)
            expect(holds, name, f"an integer from {low} on", value)
        for name, low, high in (("held_out", 0, 0.9), ("warmup", 0, 1), ("weight_decay", 0, 1e9), ("clip", 0, 1e9),
                                ("lr", 0, 1e9), ("dropout", 0, 0.999)):  # fmt: skip
            expect_number(name, getattr(self, name), low, high, name in ("lr", "dropout"))
        expect(self.held_out > 0 and self.clip > 0 and self.lr != 0, "held_out, clip and lr", "above 0", 0)
        fitting = OF_NUMBERS if self.regression else OF_CLASSES
        kind = "a regression" if self.regression else "classes"
        expect(self.metric in (None, *fitting), "metric", f"for {kind} one of {', '.join(fitting)}", self.metric)
        columns = [name for name in (self.text, self.pair, self.label) if name is not None]
        expect(len(set(columns)) == len(columns), "text, pair and label", "different columns", columns)
        expect(self.quoting in get_args(Quoting), "quoting", f"one of {', '.join(get_args(Quoting))}", self.quoting)
        check_device(self.device)

    @property
    def linear(self) -> str:
        """What multiplies here and now, as `environment` names it; a run asks for no library of its own."""
        return linear.chosen(torch.bfloat16 if self.bf16 else torch.float32)

    @property
    def outputs_after(self) -> int:
        """Epochs at the start that train no output: none of them is the best, nor counted by patience."""
        return 0

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer that the model reads by, which is exported beside it."""
        raise NotImplementedError

    def read_paths(self) -> list[Path]:
        """What the run reads."""
        given = (getattr(self, name) for name in self.sources)
        return [path for each in given if each is not None for path in ([each] if isinstance(each, Path) else each)]


@dataclasses.dataclass(frozen=True)
class FinetunePaths:
    """What must be given: a base of its own, so that it comes first in --help."""

    init: Path
    """The model folder to start from, BERT, ALBERT, RoBERTa or ERNIE, of this program or of transformers; with
    --features also an ELMo."""
    train: Path
    """The table (CSV, TSV, JSON lines) with a text and its label in each row."""
    output: Path
    """The folder for what comes of it, new, or continued with --resume: model/, scores.json and a picture."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TaskConfig, FinetunePaths):
    """Settings of `fastbert finetune`; its --help shows them."""

    command: ClassVar[str] = "finetune"
    sources: ClassVar[tuple[str, ...]] = ("train", "evaluate", "init")

    features: bool = False
    """Leave the model as it is, an ELMo's or any other's, and train a mix of its layers and a linear layer over the
    mean of a text's tokens."""
    dropout: float | None = None
    """Probability of dropout, in hidden layers and in attention; if not given the folder's. With --features of the mix
    of layers; if not given 0.1."""

    @property
    def tokenizer(self) -> Path:
        return self.init


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Settings of `fastbert predict`; its --help shows them."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A classifier's folder: model/ of `fastbert finetune`, or one of transformers."""
    file: Annotated[Path, tyro.conf.Positional]
    """A table with a column of text, or a text file with a text a line."""
    text: str | None = None
    """The table's column with the text."""
    pair: str | None = None
    """The table's column with a second text."""
    output: Path | None = None
    """Where to write a row for each text: .jsonl with every label's probability, .csv or .tsv with the likeliest one's;
    if not given they are printed as .tsv. A file of an earlier call is replaced."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double, backslash, none; auto looks at the header."""
    batch_tokens: int = 4096
    """Tokens computed at a time."""
    bf16: bool = False
    """Compute in bfloat16 (autocast)."""
    device: str = "cpu"
    """Where to compute, as torch names it."""

    def check(self) -> None:
        """Raises ValueError where a setting does not hold."""
        holds = type(self.batch_tokens) is int and self.batch_tokens > 0
        expect(holds, "batch_tokens", "an integer from 1 on", self.batch_tokens)
        check_device(self.device)
        if self.output is not None:
            expect(self.output.suffix in (".jsonl", ".csv", ".tsv"), "output", "a .jsonl, .csv or .tsv", self.output)
            if not self.output.absolute().parent.is_dir():
                raise ValueError(f"the folder of {self.output} does not exist: make it, or choose another --output")
            if self.output.exists() and self.file.exists() and self.output.samefile(self.file):
                raise ValueError(f"{self.file} would be written over by what is predicted: choose another --output")
