"""What a distillation can be told, and what of it holds."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch

from fastbert import extras
from fastbert.backends import linear
from fastbert.data.batches import LONGEST
from fastbert.data.tables import Quoting
from fastbert.finetune.settings import TaskConfig, expect_number
from fastbert.models.small import SMALL
from fastbert.pretrain.settings import PretrainConfig, expect

OutputLoss = Literal["soft", "mse"]
STUDENTS = tuple(name.removeprefix("fastbert_") for name in SMALL)


@dataclasses.dataclass(frozen=True)
class DistillPaths:
    """What must be given: a base of its own, so that it comes first in --help."""

    teacher: Path
    """The folder of a trained classifier or regression: model/ of `fastbert finetune`, or one of transformers."""
    student: str
    """What learns: textcnn, bilstm, bert (the teacher with fewer --layers), or the folder of a BERT, ALBERT, RoBERTa or
    ERNIE that reads by the teacher's tokenizer."""
    train: Path
    """The table (CSV, TSV, JSON lines) with a text and its label in each row."""
    output: Path
    """The folder for what comes of it, new, or continued with --resume: model/, scores.json and a picture."""


@dataclasses.dataclass(frozen=True)
class DistillConfig(TaskConfig, DistillPaths):
    """Settings of `fastbert distill`; its --help shows them."""

    command: ClassVar[str] = "distill"
    sources: ClassVar[tuple[str, ...]] = ("train", "evaluate", "unlabelled", "teacher", "augment_model")

    unlabelled: tuple[Path, ...] = ()
    """Texts without labels, however many, from which the student learns what the teacher makes of them: text files with
    a text a line, folders of such, or tables with the column --text."""
    store: Path | None = None
    """The folder in which the teacher's outputs for unlabelled texts are kept, for any number of runs; if not given
    labels/ in --output."""
    mix: float = 4.0
    """Unlabelled texts in an epoch for each labelled one; the next epoch goes on where it ended."""

    augment: int = 0
    """Copies of each labelled text with words replaced, as TinyBERT makes them (20): unlabelled texts beside those of
    --unlabelled, of which --mix are taken in an epoch for each labelled one."""
    augment_model: Path | None = None
    """With --augment: the folder of a pretrained model with its masked word head, which says what replaces a word."""
    augment_share: float = 0.4
    """Probability that a word is replaced."""
    augment_candidates: int = 15
    """Words of which one takes its place."""

    loss: OutputLoss = "soft"
    """How the student's outputs are compared with the teacher's: soft, cross entropy with the teacher's probabilities;
    mse, squared differences of the outputs, which a regression always has."""
    temperature: float = 2.0
    """Of soft: outputs are divided by it on both sides, so that unlikely classes count for more."""
    label_weight: float = 0.3
    """Weight of the labels' own loss, from 0, the teacher alone, to 1, the labels alone."""

    layers: int | None = None
    """Of bert: how many layers it has; they begin as copies of the teacher's, evenly spaced."""
    intermediate_size: int | None = None
    """Of bert: numbers within each layer's feed-forward network, those with the largest weights in the teacher; if not
    given all."""
    intermediate_epochs: int = 0
    """Of a transformer: so many epochs come first in which it learns the teacher's inside as TinyBERT does, embeddings,
    hidden states and attention scores; outputs and labels follow. They are part of --epochs."""
    layer_map: str = "uniform"
    """Which of the teacher's layers each layer of the student learns from, and of bert begins as: uniform, at even
    distances; last, the last ones; or their numbers from 1 on, such as 4,8,12."""
    embedding_size: int = 128
    """Of textcnn and bilstm: numbers of a word's vector."""
    width: int = 128
    """Of textcnn: filters of each window; of bilstm: numbers of each direction."""
    dropout: float | None = None
    """Probability of dropout in the student; if not given 0.5 of textcnn and bilstm, otherwise the folder's."""
    epochs: int = dataclasses.field(default=20, kw_only=True)
    """Most passes over the rows."""
    patience: int = dataclasses.field(default=4, kw_only=True)
    """Training ends after so many epochs that were no better than the best; that one's model is kept."""
    lr: float | None = dataclasses.field(default=None, kw_only=True)
    """Highest learning rate; if not given 1e-3 of textcnn and bilstm, otherwise 5e-5 at BERT base's width 768, and
    inverse to the width."""
    onnx: bool = False
    """Write model/model.onnx besides, of textcnn and bilstm."""

    @property
    def tokenizer(self) -> Path:
        return self.teacher

    @property
    def outputs_after(self) -> int:
        return self.intermediate_epochs

    @property
    def is_small(self) -> bool:
        """Whether the student is no transformer."""
        return self.student in STUDENTS

    def check(self) -> None:
        """Raises ValueError with the rule, what came and what is expected, where a setting does not hold."""
        super().check()
        expect(self.loss in get_args(OutputLoss), "loss", f"one of {', '.join(get_args(OutputLoss))}", self.loss)
        expect_number("temperature", self.temperature, 0.01, 1000)
        expect_number("label_weight", self.label_weight, 0, 1)
        expect_number("mix", self.mix, 0, 1e6)
        for name in ("embedding_size", "width"):
            value = getattr(self, name)
            expect(type(value) is int and 1 <= value < 2**20, name, "an integer from 1 on", value)
        known = self.is_small or self.student == "bert" or Path(self.student).is_dir()
        expect(known, "student", f"{', '.join(STUDENTS)}, bert or a model's folder", self.student)
        check_layers(self)
        whole = type(self.intermediate_epochs) is int and 0 <= self.intermediate_epochs < self.epochs
        expect(whole, "intermediate_epochs", f"from 0 to less than epochs, {self.epochs}", self.intermediate_epochs)
        if self.is_small and (self.intermediate_epochs or self.layer_map != "uniform"):
            raise ValueError(
                f"--intermediate-epochs and --layer-map are of transformers, got --student {self.student}: it has no "
                "layers like the teacher's"
            )
        if (self.unlabelled or self.augment) and self.pair is not None:
            raise ValueError("--unlabelled and --augment are of single texts, and --pair asks for two: leave one out")
        self._check_augmentation()
        if self.store is not None and not self.unlabelled:
            raise ValueError("--store keeps what the teacher makes of --unlabelled texts: name these too")
        if self.onnx:
            expect(self.is_small, "onnx", f"left out but for {' and '.join(STUDENTS)}", self.student)
            if why := extras.missing("writing ONNX needs", "onnx", "onnxscript"):
                raise ImportError(why)

    def _check_augmentation(self) -> None:
        for name, low in (("augment", 0), ("augment_candidates", 1)):
            value = getattr(self, name)
            expect(type(value) is int and low <= value <= 1000, name, f"an integer from {low} to 1000", value)
        expect_number("augment_share", self.augment_share, 0, 1)
        if (self.augment_model is None) == bool(self.augment):
            raise ValueError(
                "--augment and --augment-model go together: how many copies, and the folder of a model with its masked "
                f"word head; got augment {self.augment} and augment_model {self.augment_model}"
            )
        if self.augment and self.store is not None:
            raise ValueError("--augment makes texts of this run's own, and --store is for several: leave one out")

    @property
    def store_folder(self) -> Path:
        return self.output / "labels" if self.store is None else self.store


@dataclasses.dataclass(frozen=True)
class GeneralPaths:
    """What must be given: a base of its own, so that it comes first in --help."""

    teacher: Path
    """The folder of a pretrained BERT, RoBERTa or ERNIE, of fastbert pretrain or of transformers."""
    student: str
    """What learns: bert, the teacher with fewer --layers, narrower where --width says so; or the folder of a model that
    reads by the teacher's tokenizer."""
    corpus: Path
    """A text file (one sentence or more per line, blank lines between documents), a table (CSV, TSV, JSON lines), or a
    folder of such."""
    output: Path
    """The folder for what comes of it, new, or continued with --resume: model/, metrics.jsonl and scores.json."""


@dataclasses.dataclass(frozen=True)
class GeneralConfig(GeneralPaths):
    """Settings of `fastbert distill --corpus`; its --help shows them."""

    command: ClassVar[str] = "distill"
    sources: ClassVar[tuple[str, ...]] = ("teacher", "corpus")

    column: str | None = None
    """The table's column, or the JSON objects' field, that holds the text; every row is a document."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double ("" for a quote within), backslash, none; auto looks at the header."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation."""

    layers: int | None = None
    """Of bert: how many layers it has."""
    width: int | None = None
    """Of bert: its hidden size, a multiple of its heads. It then begins as random numbers; if not given it has the
    teacher's width, and begins as copies of the teacher's layers."""
    heads: int | None = None
    """Of bert: its attention heads, a divisor or a multiple of the teacher's; the means of neighbouring heads' scores
    are then compared, and it begins as random numbers. If not given the teacher's."""
    intermediate_size: int | None = None
    """Of bert: numbers within each layer's feed-forward network; if not given the teacher's, and with --width as many
    times the width as in the teacher."""
    layer_map: str = "uniform"
    """Which of the teacher's layers each layer of the student learns from: uniform, at even distances; last, the last
    ones; or their numbers from 1 on, such as 4,8,12."""
    dropout: float | None = None
    """Probability of dropout in the student; if not given as in the teacher's, or the student's, folder."""

    seq_len: int = 128
    """Longest sequence in tokens, [CLS] and [SEP] included."""
    batch_tokens: int = 4096
    """Tokens of a batch; sequences are packed without padding."""
    accumulate: int = 1
    """Batches whose gradients are added up for one step; several processes share them out (torchrun)."""
    steps: int | None = None
    """Optimizer steps; with --minutes as well: at most so many."""
    minutes: float | None = None
    """Training time, which the learning rate then follows."""
    lr: float = 2e-4
    """Highest learning rate."""
    warmup: float = 0.1
    """Share of the steps, or of the time, in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """Decoupled; none on biases and LayerNorm."""
    clip: float = 1.0
    """Largest norm of the gradient that is applied."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights stay float32."""
    seed: int = 0
    """Of everything random."""

    evaluations: int = 8
    """Evaluations on the held-out part, evenly over the run."""
    evaluation_batches: int = 32
    """Batches of one evaluation."""
    snapshot_every: int = 1000
    """Steps between snapshots, from which a run can be resumed; Ctrl-C and SIGTERM take one too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    workers: int = 0
    """Processes that prepare batches, of each training process; 0 prepares them there."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    @property
    def linear(self) -> str:
        """As of `TaskConfig`."""
        return linear.chosen(torch.bfloat16 if self.bf16 else torch.float32)

    def as_pretraining(self) -> PretrainConfig:
        """A pretraining run on the same data: whole texts, unmasked, by the teacher's tokenizer."""
        names = {field.name for field in dataclasses.fields(PretrainConfig)}
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        return PretrainConfig(**same, init=self.teacher, objective="clm", max_position_embeddings=LONGEST)

    def check(self) -> None:
        """Raises ValueError with the rule, what came and what is expected, where a setting does not hold."""
        self.as_pretraining().check()
        known = self.student == "bert" or Path(self.student).is_dir()
        expect(known, "student", "bert or a model's folder", self.student)
        check_layers(self)
        for name in ("width", "heads"):
            value = getattr(self, name)
            expect(value is None or (type(value) is int and value >= 1), name, "an integer from 1 on", value)
            if value is not None and self.student != "bert":
                raise ValueError(f"--{name} is of --student bert, got --student {self.student}")


def check_layers(config: DistillConfig | GeneralConfig) -> None:
    """Raises ValueError unless layers, and sizes within them, are given where the student is made by them alone."""
    if (config.layers is None) == (config.student == "bert"):
        raise ValueError(
            "--student bert needs --layers, how many of the teacher's it has, and no other student takes it: "
            f"got --student {config.student} and layers {config.layers}"
        )
    for name in ("layers", "intermediate_size"):
        value = getattr(config, name)
        expect(value is None or (type(value) is int and value >= 1), name, "1 or more", value)
    if config.intermediate_size is not None and config.student != "bert":
        raise ValueError(f"--intermediate-size is of --student bert, got --student {config.student}")
