"""A pretraining run: its settings, its folder, and what must agree for it to resume bit for bit."""

import dataclasses
import json
import math
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastbert import backend, files, native
from fastbert.bert import BertConfig
from fastbert.data.corpus import iter_documents
from fastbert.ops import linear
from fastbert.version import __version__


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of a run; `fastbert pretrain --help` shows them."""

    output: Path
    """The run's folder; made by a new run, continued with --resume."""
    corpus: Path | None = None
    """A text file (one sentence or more per line, blank lines between documents), a folder of such, or a CSV file."""
    column: str | None = None
    """The CSV file's column that holds the text; every row is a document."""

    preset: str = "tiny"
    """Size of the model: tiny, mini, small, base or large."""
    vocab_size: int = 8192
    """Entries of the WordPiece vocabulary that is trained on the corpus."""
    lowercase: bool = True
    """Lower-case the text and strip accents, as uncased BERT does."""
    max_position_embeddings: int = 512
    """Rows of the position table: the longest sequence the model will ever take."""
    dropout: float = 0.1
    """Probability of dropout, in hidden layers and in attention."""

    seq_len: int = 128
    """Longest sequence in tokens, [CLS] and [SEP] included."""
    batch_tokens: int = 4096
    """Tokens of a batch; sequences are packed without padding."""
    accumulate: int = 1
    """Batches whose gradients are added up for one step."""
    nsp: bool = True
    """Train next-sentence prediction beside the masked language model."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation."""

    steps: int | None = None
    """Optimizer steps; either this or --minutes."""
    minutes: float | None = None
    """Training time: turned into a number of steps once, after a short measurement, before the schedule starts."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """Decoupled; none on biases and LayerNorm."""
    beta2: float = 0.98
    """Decay of Adam's second moment; RoBERTa's value, BERT's own 0.999 learns more slowly in short runs."""
    clip: float = 1.0
    """Largest norm of the gradient that is applied."""
    embedding_update: Literal["touched", "all"] = "all"
    """Rows of the word embeddings that a step moves: all, or those whose word stands in its input or labels."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights stay float32."""
    linear: Literal["auto", "torch", "onednn", "widened", "fastbert"] = "auto"
    """Library of the products on a CPU; auto: the fastest one, timed once, when the run starts, and kept; near-ties go
    to the one that is usual for the processor."""
    seed: int = 0
    """Of everything random. The same corpus, settings and seed give the same weights, bit for bit, where what
    config.json names under "environment" is the same too, the library that --linear auto chose among it."""

    evaluations: int = 8
    """Evaluations on the held-out part, evenly over the run."""
    evaluation_batches: int = 32
    """Batches of one evaluation."""
    snapshot_every: int = 1000
    """Steps between snapshots, from which a run can be resumed; Ctrl-C and SIGTERM take one too."""
    keep: int = 2
    """Snapshots kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process. The batches are the same."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    def check(self) -> None:
        """Raises ValueError with the rule, where a setting does not hold."""
        BertConfig.preset(self.preset)
        if self.steps is None and self.minutes is None:
            raise ValueError("a run ends after so many steps or minutes: give one of them")
        for name in ("batch_tokens", "accumulate", "evaluations", "evaluation_batches", "snapshot_every", "keep"):
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _expect(self.log_every >= 1, "log_every", "at least 1", self.log_every)
        _expect(self.workers >= 0, "workers", "0 or more", self.workers)
        _expect(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        _expect(self.minutes is None or self.minutes > 0, "minutes", "more than 0", self.minutes)
        _expect(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        _expect(0 <= self.warmup <= 1, "warmup", "a share from 0 to 1", self.warmup)
        _expect(0 < self.held_out <= 0.5, "held_out", "a share above 0 and at most 0.5", self.held_out)
        _expect(self.vocab_size >= 64, "vocab_size", "at least 64", self.vocab_size)
        _expect(self.clip > 0, "clip", "more than 0", self.clip)
        _expect(0 <= self.beta2 < 1, "beta2", "a number from 0 to below 1", self.beta2)
        _expect(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _expect(0 <= self.dropout < 1, "dropout", "a probability below 1", self.dropout)
        _expect(
            8 <= self.seq_len <= self.max_position_embeddings,
            "seq_len",
            f"from 8 to the rows of the position table, max_position_embeddings={self.max_position_embeddings}",
            self.seq_len,
        )
        rule = f"at least one sample's, seq_len={self.seq_len}"
        _expect(self.batch_tokens >= self.seq_len, "batch_tokens", rule, self.batch_tokens)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device must be one that torch has here, got {self.device!r}: {error}") from error


def _expect(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value}")


def new_run(config: PretrainConfig) -> PretrainConfig:
    """The settings of a new run, checked, before anything of it is written.

    Raises:
        ValueError, TypeError, OSError: a setting or the corpus does not hold.
    """
    config.check()
    backend.check()
    if config.steps is not None and config.minutes is not None:
        raise ValueError(f"a run ends after steps or minutes, not both: got {config.steps} and {config.minutes:g}")
    if config.corpus is None:
        raise ValueError("a new run needs a corpus: a text file, a folder of text files, or a CSV file with --column")
    refuse_a_second_run(config.output)
    next(iter_documents(config.corpus, config.column))
    return dataclasses.replace(config, linear=choose_linear(config))


def resumed_run(folder: Path) -> PretrainConfig:
    """The settings of the run in `folder`; raises as `read_config` and `choose_linear`."""
    config = read_config(folder)
    return dataclasses.replace(config, linear=choose_linear(config))


def refuse_a_second_run(folder: Path) -> None:
    """Raises ValueError where `folder` holds a run, or what is left of one."""
    for name in ("config.json", "snapshots", "metrics.jsonl"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} already holds a run ({name}): pass --resume to continue it, or choose another --output"
            )


def refuse_many_processes() -> None:
    """Raises ValueError where torchrun or its like started this process as one of several."""
    world = os.environ.get("WORLD_SIZE", "")
    if world not in ("", "1"):
        raise ValueError(
            f"a run trains in one process, and WORLD_SIZE={world} says that this is one of several: start it once, "
            "without torchrun (on a CPU one process uses all cores; OMP_NUM_THREADS says how many)"
        )


def choose_linear(config: PretrainConfig) -> str:
    """The library of the run's products: FASTBERT_LINEAR's, the setting's, or for a new run the fastest one."""
    name = config.linear if linear.requested() == "auto" else linear.requested()
    linear.check(name)
    if name != "auto":
        return name
    if torch.device(config.device).type != "cpu":
        return "torch"
    model = BertConfig.preset(config.preset)
    rows = min(config.batch_tokens, 512)  # more take longer and tell no more
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    name, why = linear.fastest(rows, model.hidden_size, model.intermediate_size, dtype)
    print(f"linear products by {name}: {why}")
    return name


# Settings that runs did not have once, and what they did then.
_ADDED_LATER = {"linear": "torch"}


def read_config(folder: Path) -> PretrainConfig:
    """The settings of the run in `folder`.

    Raises:
        FileNotFoundError: there is no run. ValueError: its config.json is damaged; the message says where.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no run to resume: there is no {path}. A run that ended before its data was ready is "
            "started again without --resume, and reuses what is good"
        )
    with files.naming(path):
        content = path.read_bytes()
    try:
        stored = json.loads(content)
        if not isinstance(stored, dict):
            raise ValueError("it is no JSON object")
        stored.pop("environment", None)
        stored = _ADDED_LATER | stored | {"output": folder}
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        config = PretrainConfig(**stored | {"corpus": None if stored["corpus"] is None else Path(stored["corpus"])})
        config.check()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run: {error}. Put it back as it was, or start a new run in "
            "another --output"
        ) from error
    return config


def write_config(config: PretrainConfig) -> None:
    """Writes config.json: the settings, and the environment, all that the run's weights depend on beside its corpus."""
    content = dataclasses.asdict(config) | {"environment": environment(config)}
    files.write(config.output, {"config.json": (files.json_text(content, indent=2) + "\n").encode()})


def random_state(device: str) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {})


def set_random_state(states: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.startswith("cuda"):
        torch.cuda.set_rng_state(states["cuda"], device)


def environment(config: PretrainConfig) -> dict[str, Any]:
    """What a resumed run must share with the run before it to continue bit for bit."""
    return {
        "fastbert": __version__,
        "torch": str(torch.__version__),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": native.isa or "none",
        "backend": backend.requested() or "by device",
        "linear products": config.linear,
    }


def name_differences(then: dict[str, Any], config: PretrainConfig) -> None:
    now = environment(config)
    different = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    if different:
        print(f"resumed elsewhere than it was stopped, so not bit for bit the unbroken run: {', '.join(different)}")
