"""What a distillation can be told, and what of it holds."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal, get_args

from fastbert import extras
from fastbert.finetune.settings import TaskConfig, expect_number
from fastbert.models.small import SMALL
from fastbert.pretrain.settings import expect

OutputLoss = Literal["soft", "mse"]
STUDENTS = tuple(name.removeprefix("fastbert_") for name in SMALL)


@dataclasses.dataclass(frozen=True)
class DistillConfig(TaskConfig):
    """Settings of `fastbert distill`; its --help shows them."""

    command: ClassVar[str] = "distill"
    sources: ClassVar[tuple[str, ...]] = ("train", "evaluate", "unlabelled", "teacher")

    teacher: Path
    """The folder of a trained classifier or regression: model/ of `fastbert finetune`, or one of transformers."""
    student: str
    """What learns: textcnn, bilstm, bert (the teacher with fewer --layers), or the folder of a BERT, ALBERT, RoBERTa or
    ERNIE that reads by the teacher's tokenizer."""
    train: Path
    """The table (CSV, TSV, JSON lines) with a text and its label in each row."""
    output: Path
    """The folder for what comes of it, new, or continued with --resume: model/, scores.json and a picture."""
    unlabelled: tuple[Path, ...] = ()
    """Texts without labels, however many, from which the student learns what the teacher makes of them: text files with
    a text a line, folders of such, or tables with the column --text."""
    store: Path | None = None
    """The folder in which the teacher's outputs for unlabelled texts are kept, for any number of runs; if not given
    labels/ in --output."""
    mix: float = 4.0
    """Unlabelled texts in an epoch for each labelled one; the next epoch goes on where it ended."""

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
        if (self.layers is None) == (self.student == "bert"):
            raise ValueError(
                "--student bert needs --layers, how many of the teacher's it has, and no other student takes it: "
                f"got --student {self.student} and layers {self.layers}"
            )
        expect(
            self.layers is None or (type(self.layers) is int and self.layers >= 1), "layers", "1 or more", self.layers
        )
        if self.intermediate_size is not None and self.student != "bert":
            raise ValueError(f"--intermediate-size is of --student bert, got --student {self.student}")
        if self.unlabelled and self.pair is not None:
            raise ValueError("--unlabelled holds single texts, and --pair asks for two: leave one of them out")
        if self.store is not None and not self.unlabelled:
            raise ValueError("--store keeps what the teacher makes of --unlabelled texts: name these too")
        if self.onnx:
            expect(self.is_small, "onnx", f"left out but for {' and '.join(STUDENTS)}", self.student)
            if why := extras.missing("writing ONNX needs", "onnx", "onnxscript"):
                raise ImportError(why)

    @property
    def store_folder(self) -> Path:
        return self.output / "labels" if self.store is None else self.store
