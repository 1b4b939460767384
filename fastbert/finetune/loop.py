"""A classifier or a regression trained: what `fastbert finetune` and `distill` run, in the order it happens.

The run's folder gets `config.json` when everything is checked, which makes it a run; then `snapshots/`, from which it
can be resumed, and `model/` as soon as an epoch is the best so far. At the end `scores.json` and a picture are written
and the snapshots removed.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert import allocator, files
from fastbert.backends import check_environment
from fastbert.data.texts import Encoded, encode
from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune.examples import Examples, read_examples
from fastbert.finetune.run import (
    Config,
    begun,
    fingerprint,
    read_config,
    refuse_many_processes,
    refuse_what_is_there,
    resume_command,
    settings_text,
)
from fastbert.finetune.scores import better, class_scores, confusion_picture, number_scores, scatter_picture
from fastbert.finetune.settings import FinetuneConfig, TaskConfig
from fastbert.finetune.training import FeatureTrainer, Scale, Trainer, make_model
from fastbert.models.classification import SequenceClassifier
from fastbert.pretrain import snapshot
from fastbert.pretrain.environment import environment, name_differences, random_state, set_random_state
from fastbert.signals import stop_signals

KEPT = 2  # snapshots
STATE = "model", "optimizer", "step", "total", "epochs", "best", "predicted", "random", "environment", "data"


def finetune(config: FinetuneConfig, resume: bool = False) -> Path | None:
    """Trains a classifier, or with `regression` a regression, and keeps the epoch that scored best.

    `config.output` gets `model/`, which `transformers` loads, as soon as an epoch is the best so far; at the end
    `scores.json`, every epoch's scores, and a picture of the best one's predictions.

    Args:
        config: the run's settings.
        resume: continues the run in `config.output` from its newest snapshot, with the settings that it has; in the
            same environment the result is that of an unbroken run, bit for bit.

    Returns:
        The folder with the model; None where Ctrl-C or SIGTERM stopped the run, its state saved.

    Raises:
        ValueError, OSError: settings, folder, tables or snapshot that do not hold, before anything is written; a
            training that diverged; a folder in which another process trains.
    """
    config = checked(config, resume)
    train, evaluation, classes = read_examples(config)
    model = make_model(config, classes)
    encoded, held_out = encode_both(config, train, evaluation, classes, model.config)
    model.to(config.device)
    scale = Scale.of(train.targets) if config.regression else None
    train_with = FeatureTrainer if config.features else Trainer
    trainer = train_with(config, model, encoded, train.targets if scale is None else scale.standardized(train.targets))
    data = fingerprint((encoded, held_out), (train.targets, evaluation.targets), classes)
    with begun(config, resume):
        return train_epochs(trainer, held_out, evaluation.targets, classes, scale, data, resume)


def checked(config: Config, resume: bool) -> Config:
    """The settings, of a run that is resumed the stored ones; raises what `finetune` says of settings and folder."""
    refuse_many_processes()
    check_environment()
    if resume:
        config = read_config(config.output, type(config))
    else:
        config.check()
        refuse_what_is_there(config.output)
    allocator.keep_memory()
    return config


def encode_both(
    config: TaskConfig, train: Examples, evaluation: Examples, classes: list[str], sizes: Any
) -> tuple[list[Encoded], list[Encoded]]:
    """The texts to train and to evaluate on as tokens for a model of these sizes; says how many there are."""
    longest = sizes.longest if config.seq_len is None else config.seq_len
    if longest > sizes.longest:
        raise ValueError(f"seq_len must be at most what the model takes, {sizes.longest}, got {longest}")
    tokenizer = load_tokenizer(config.tokenizer)
    encoded, held_out = (encode(tokenizer, each.texts, longest, sizes.vocab_size) for each in (train, evaluation))
    cut = sum(each.cut for each in encoded) / len(encoded)
    print(
        f"{len(encoded):,} texts to train on, {len(held_out):,} to evaluate on; {cut:.1%} are cut at {longest} tokens\n"
        f"{'a number' if config.regression else f'{len(classes)} classes: ' + ', '.join(classes[:20])}"
    )
    return encoded, held_out


def train_epochs(
    trainer: Trainer, held_out: list[Encoded], targets: Tensor, classes: list[str], scale: Scale | None, data: str,
    resume: bool, finish: Callable[[], None] = lambda: None,
) -> Path | None:  # fmt: skip
    """Trains, evaluates and exports as `finetune` says, within the run's folder, which is `begun`.

    Args:
        trainer: at its start.
        held_out: N texts to evaluate on.
        targets: int64 [N], their classes, or float64 [N], their numbers.
        classes: their names; of a regression the column's.
        scale: of a regression.
        data: the fingerprint of what is trained on.
        resume: goes on from the newest snapshot.
        finish: called when the best model is exported, before the report says that the run has ended.
    """
    config, model = trainer.config, trainer.model
    history = History(config)
    if resume:
        _go_on(trainer, history, data, scale)

    def take_snapshot() -> None:
        state = {
            "model": trainer.learned().state_dict(), "optimizer": trainer.optimizer.state_dict(), "step": trainer.step,
            "total": trainer.total, **history.state(), "random": random_state(config.device),
            "environment": environment(config), "data": data,
        }  # fmt: skip
        snapshot.save(config.output / "snapshots", trainer.step, state, KEPT)

    with stop_signals() as stopped:
        while not history.ended():
            with contextlib.closing(trainer.epoch()) as steps:
                for _ in steps:
                    if stopped or trainer.step % config.snapshot_every == 0:
                        take_snapshot()
                    if stopped:
                        return _stop(trainer, stopped[0])
            logits = trainer.logits(held_out)
            trainer.expect_finite(logits, "the model's outputs for the texts to evaluate on are")
            predicted = logits.argmax(-1) if scale is None else scale.numbers(logits[:, 0])
            is_best = history.add(trainer.mean_loss, targets, predicted)
            take_snapshot()  # before the export: of a run that is killed between the two, this model is exported
            if is_best:
                _export(model, scale, config)
            if stopped and not history.ended():
                return _stop(trainer, stopped[0])
    finish()
    _write_report(trainer, history, targets, classes)
    return config.output / "model"


class History:
    """Every epoch's scores, and which of them was the best so far.

    Attributes:
        epochs: a dict of each.
        best: the place of the best one in `epochs`; None before the first that trains outputs.
        predicted: what it predicted: classes, int64 [N], or numbers, float64 [N].
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.metric = config.metric or ("pearson" if config.regression else "accuracy")
        self.epochs: list[dict[str, float]] = []
        self.best: int | None = None
        self.predicted: Tensor | None = None

    def add(self, loss: float, targets: Tensor, predicted: Tensor) -> bool:
        """One more epoch; whether it is the best so far."""
        measure = number_scores if self.config.regression else class_scores
        scores = measure(targets.numpy(), predicted.numpy())
        counts = len(self.epochs) >= self.config.outputs_after
        is_best = counts and better(scores[self.metric], None if self.best is None else self.best_score, self.metric)
        self.epochs.append({"epoch": len(self.epochs) + 1, "loss": loss, **scores})
        if is_best:
            self.best, self.predicted = len(self.epochs) - 1, predicted
        shown = "  ".join(f"{name} {value:.4f}" for name, value in list(self.epochs[-1].items())[1:])
        print(f"epoch {len(self.epochs)} of {self.config.epochs}: {shown}{'  (best)' if is_best else ''}", flush=True)
        if self.without_gain() >= self.config.patience:
            print(f"no better for {self.config.patience} epochs: the model of epoch {self.best + 1} is kept")
        return is_best

    @property
    def best_score(self) -> float:
        return self.epochs[self.best][self.metric]

    def without_gain(self) -> int:
        """Epochs since the best one."""
        return 0 if self.best is None else len(self.epochs) - self.best - 1

    def ended(self) -> bool:
        return len(self.epochs) >= self.config.epochs or self.without_gain() >= self.config.patience

    def state(self) -> dict[str, object]:
        """For a snapshot, which refuses NaN as a number; a correlation may be NaN."""
        return {"epochs": json.dumps(self.epochs), "best": self.best, "predicted": self.predicted}

    def load(self, state: dict[str, object]) -> None:
        self.epochs, self.best, self.predicted = json.loads(state["epochs"]), state["best"], state["predicted"]


def _go_on(trainer: Trainer, history: History, data: str, scale: Scale | None) -> None:
    """Puts everything where the newest snapshot says that it stood; without one it stands at the start."""
    config, folder = trainer.config, trainer.config.output
    state = snapshot.load(folder / "snapshots", STATE)
    if state is None:
        return
    if state["data"] != data:
        raise ValueError(
            f"the texts, their labels, the tokenizer or a teacher are not those that the run in {folder} began with: "
            f"put back {', '.join(map(str, config.read_paths()))} as they were, or start a new run in another --output"
        )
    name_differences(state["environment"], config)
    try:
        trainer.learned().load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"the model to start from is another than the run in {folder} began with: {error}") from error
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.step, trainer.total = state["step"], state["total"]
    history.load(state)
    set_random_state(state["random"], config.device)
    if history.best is None:
        return
    if trainer.step == (history.best + 1) * trainer.steps:
        _export(trainer.model, scale, config)
    elif not (folder / "model").is_dir():
        raise ValueError(
            f"{folder / 'model'} is missing, the model of epoch {history.best + 1}, the best so far: put it back, or "
            "start a new run in another --output"
        )


def _export(model: SequenceClassifier, scale: Scale | None, config: TaskConfig) -> None:
    exported = model if scale is None else scale.into(model)
    exported.save_pretrained(config.output / "model", tokenizer=config.tokenizer)


def _stop(trainer: Trainer, by: str) -> None:
    steps = trainer.steps * trainer.config.epochs
    print(f"stopped by {by} after step {trainer.step} of {steps}; go on with: {resume_command(trainer.config)}")


def _write_report(trainer: Trainer, history: History, targets: Tensor, classes: list[str]) -> None:
    config, folder, predicted = trainer.config, trainer.config.output, history.predicted.numpy()
    title = f"{history.metric} {history.best_score:.3f} on {len(predicted):,} held-out texts"
    truth = targets.numpy()
    if config.regression:
        name, picture = "predictions.png", scatter_picture(truth, predicted, title)
    else:
        name, picture = "confusion.png", confusion_picture(truth, predicted, classes, title)
    finite = [{key: value if value == value else None for key, value in each.items()} for each in history.epochs]
    scores = {
        "best_epoch": history.best + 1, "metric": history.metric, "epochs": finite,
        "settings": dataclasses.asdict(config),
    }  # fmt: skip
    files.write(folder, {name: picture, "scores.json": settings_text(scores)})  # from here on the run has ended
    shutil.rmtree(folder / "snapshots", ignore_errors=True)
    print(f"\n{title}\nmodel     {folder / 'model'}  (for fastbert predict; {trainer.model.loaded_by})")
    print(f"scores    {folder / 'scores.json'}\npicture   {folder / name}")
