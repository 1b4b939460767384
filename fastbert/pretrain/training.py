"""The training of a run: its steps, what is logged and evaluated between them, its snapshots."""

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from fastbert.backends.gpu import check_device_errors
from fastbert.data.batch import Batch
from fastbert.data.batches import PretrainBatches
from fastbert.models.pretraining import PreTrainingModel
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.pretrain import shards, snapshot
from fastbert.pretrain.accuracy import as_numbers
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.environment import environment, name_differences, random_state, set_random_state
from fastbert.pretrain.evaluate import Frequencies, evaluate
from fastbert.pretrain.meter import Meter
from fastbert.pretrain.phases import current_phase
from fastbert.pretrain.prepare import check_fingerprints
from fastbert.pretrain.processes import Processes
from fastbert.pretrain.report import Metrics, shown
from fastbert.pretrain.schedule import Progress, learning_rate
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.split import split
from fastbert.pretrain.start import starting_model
from fastbert.pretrain.step import make_optimizer, make_step, pair, products, train_words
from fastbert.pretrain.stream import Stream
from fastbert.pretrain.together import Together
from fastbert.signals import stop_signals

STATE = "model", "optimizer", "epoch", "index", "step", "tokens", "random", "environment", "data"  # of a snapshot
WORTH_SAYING = 0.05  # of the time


class Data(NamedTuple):
    """What a run reads: batches of either side, those of each phase."""

    tokenizer: Tokenizer
    train: list[PretrainBatches]
    held_out: list[PretrainBatches]
    frequencies: Frequencies
    fingerprints: dict[str, Any]


class Training:
    """A run's model and optimizer, where it stands, and its steps from there on.

    Attributes:
        model: on the run's device; with `--shard` this process's part of it.
        phase: the number of the phase, whose sequences are so long.
        tokens: of all processes, without padding, since the run began; up to date where it is logged.
        scores: of the last evaluation; empty where there was none yet.
        stopped: what ended the run early; None where it is over, or goes on.
    """

    def __init__(self, config: PretrainConfig, data: Data, processes: Processes):
        """The run's beginning, or where its newest snapshot left it.

        Raises:
            ValueError, OSError: a snapshot that does not hold, or of another run.
        """
        self.config, self.data, self.processes = config, data, processes
        self.phases = config.all_phases()
        torch.manual_seed(config.seed)
        model, new_rows = starting_model(config, data.tokenizer, data.frequencies)
        self.model, self.new_rows = model.to(config.device), new_rows.to(config.device)
        self.model.base_model.checkpoint_layers = config.checkpoint_layers
        processes.share_values(self.model.parameters())  # which were drawn alike, if all processors draw alike
        if config.shard:
            split(self.model, config)
        self.optimizer = make_optimizer(self.model, config)

        clock = time.perf_counter if config.minutes is None else processes.clock  # of a run that ends by it
        state = snapshot.load(config.output / "snapshots", STATE, processes) or {}
        self.phase, self.tokens = state.get("phase", 0), state.get("tokens", 0)
        self._own_tokens = 0  # of this process, not yet counted among those of all
        if state:
            check_fingerprints(state["data"], data.fingerprints, config.output)
            name_differences(state["environment"], config)
            load_trained(state, self.model, self.optimizer, config.output, processes)
            set_random_state(state["random"], config.device)
        done = state.get("step", 0), state.get("milliseconds", 0)
        self.progress = Progress(config.steps, config.minutes, *done, clock)  # loading is no training
        share = processes.share(config.accumulate)
        self._stream = Stream(data.train[self.phase], config.workers, config.accumulate, share)
        if state:
            self._stream.epoch, self._stream.index = state["epoch"], state["index"]

        self._watch, self._meter = Watch(config), Meter(config, self.model.config)
        self._take_step = make_step(self.model, self.optimizer, config, self._watch, processes)
        self._words_alone = Together(processes, config.accumulate)  # new words' rows are exchanged, not the table
        self.scores: dict[str, float] = {}
        self.stopped: str | None = None

    def run(self) -> None:
        """Trains until the run is over, or a signal to any process stops it: its state is then in a snapshot.

        Raises:
            ValueError: it diverged. OSError: a snapshot cannot be written.
        """
        config, progress = self.config, self.progress
        print(self._meter)
        metrics = Metrics(config.output, progress.step, writes=self.processes.is_first)
        bar = tqdm(
            total=config.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True,
            disable=not self.processes.is_first,
        )  # fmt: skip
        self._meter.start(self.tokens)
        with stop_signals() as stopped, contextlib.closing(metrics), bar:
            stop_asked, stop = self.processes.stop_asked(stopped), False
            batches = iter(self._stream)
            while not (progress.over or stop):
                if self._next_phase():
                    batches = iter(self._stream)
                    longest = self.phases[self.phase].seq_len
                    bar.write(f"from step {progress.step + 1} on: sequences of up to {longest} tokens")
                lr, record = self._step(batches)
                evaluated = progress.parts(config.evaluations)
                progress.advance()
                step, over, stop = progress.step, progress.over, stop_asked()
                bar.update()
                if step % config.log_every == 0 or over:
                    self._log(metrics, bar, lr, record)
                if progress.parts(config.evaluations) > evaluated:
                    self._evaluate(metrics)
                if step % config.snapshot_every == 0 or over or stop:
                    self._take_snapshot()
                    self._meter.start(self.tokens)
        if not progress.over:
            self.stopped = stopped[0] if stopped else "a signal to another process"

    def held_out_scores(self) -> dict[str, float]:
        """What `evaluate` says of the model now, on sequences of the phase's length."""
        config, held_out = self.config, self.data.held_out[self.phase]
        with products(config):
            scores = evaluate(
                self.model, held_out, config.evaluation_batches, self.data.frequencies, config.device, pair(config),
                self.processes,
            )  # fmt: skip
        return scores | {"seq_len": self.phases[self.phase].seq_len}

    def _next_phase(self) -> bool:
        """Whether another phase begins here; its batches are then the stream's."""
        phase = current_phase(self.phases, *self.progress.done())
        if phase <= self.phase:
            return False
        self.phase, self._stream = phase, self._stream.followed_by(self.data.train[phase])
        return True

    def _step(self, batches: Iterator[list[Batch]]) -> tuple[float, dict[str, Any]]:
        """The next step's learning rate, and what there is to log of it."""
        config, progress = self.config, self.progress
        with self._meter.waiting():
            micro = next(batches)
        self._meter.count(micro)
        lr = learning_rate(
            *progress.done(), config.lr, config.warmup, config.schedule,
            power=config.power, decay=config.decay, final=config.final_lr,
        )  # fmt: skip
        if progress.step < config.rows_first:
            numbers = lr, config, self._watch, progress.step + 1
            record = train_words(self.new_rows, self.model, self.optimizer, micro, *numbers, together=self._words_alone)
        else:
            record = self._take_step(micro, lr, progress.step + 1)
        self._own_tokens += sum(each.filled_tokens for each in micro)
        return lr, record

    def _log(self, metrics: Metrics, bar: tqdm, lr: float, record: dict[str, Any]) -> None:
        """A step's record to `metrics.jsonl` and the bar."""
        self._watch.look()
        self._count_tokens()
        record = as_numbers(record)
        used = self._meter.used(self.tokens)
        seq_len = self.phases[self.phase].seq_len
        metrics.write({"step": self.progress.step, **record, "seq_len": seq_len, "tokens": self.tokens, **used})
        postfix = {"loss": f"{record['loss']:.3f}", "lr": f"{lr:.2g}"}
        postfix["tokens/s"] = f"{used['tokens_per_second']:,}"
        if used["waiting"] > WORTH_SAYING:
            postfix["waits for data"] = f"{used['waiting']:.0%}"
        if self.scores:
            postfix["held-out"] = shown(self.scores["mlm_loss"], ".3f")
        bar.total = self.progress.expected_steps()
        bar.set_postfix(postfix, refresh=False)
        self._meter.start(self.tokens)

    def _evaluate(self, metrics: Metrics) -> None:
        self._watch.look()
        self._count_tokens()
        self.scores = self.held_out_scores()
        held_out = {f"held_out/{name}": value for name, value in self.scores.items()}
        metrics.write({"step": self.progress.step, **held_out})
        self._watch.scores(self.progress.step, self.scores)
        self._meter.start(self.tokens)

    def _count_tokens(self) -> None:
        self.tokens += self.processes.total(self._own_tokens)
        self._own_tokens = 0

    def _take_snapshot(self) -> None:
        self._count_tokens()
        config, progress, processes = self.config, self.progress, self.processes
        trained = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state = {
            "epoch": self._stream.epoch, "index": self._stream.index, "phase": self.phase, "step": progress.step,
            "milliseconds": progress.milliseconds, "tokens": self.tokens, "random": random_state(config.device),
            "environment": environment(config), "data": self.data.fingerprints,
        }  # fmt: skip
        self._watch.look()
        check_device_errors()
        self._watch.state(progress.step, trained, processes)
        where = config.output / "snapshots", progress.step
        if processes.count == 1 and not config.shard:
            snapshot.save(*where, trained | state, config.keep)
        else:
            save = functools.partial(shards.save, self.model, self.optimizer)
            snapshot.save(*where, state, config.keep, processes, save)


def load_trained(
    state: dict[str, Any], model: PreTrainingModel, optimizer: LazyAdam, folder: Path, processes: Processes
) -> None:
    """Loads model and optimizer as a snapshot of the run in `folder` has them.

    Raises:
        ValueError: it has those of another model, or numbers that are not finite.
    """
    try:
        if "shards" not in state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        shards.load(model, optimizer, state["shards"])
    except RuntimeError as error:
        raise ValueError(f"{folder / 'config.json'} describes another model than the snapshot: {error}") from error
    loaded = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    bad = next(filter(None, processes.gathered(snapshot.not_finite(loaded))), None)
    if bad is not None:
        raise snapshot.unusable(folder / "snapshots", f"{bad} is not finite")
