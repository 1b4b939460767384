"""TinyBERT's general stage: what `fastbert distill --corpus` runs, in the order it happens.

A student learns the inside of a pretrained model, embeddings, hidden states and attention scores, on any text, before
it has a task. Text is read as by `fastbert pretrain`, and nothing is masked. The run's folder gets `config.json`, which
makes it a run; `tokenizer/` and `data/`, the text as tokens; `metrics.jsonl`, `tensorboard/` and `snapshots/`; and at
the end `model/`, the student, and `scores.json`.

Source: Jiao et al., "TinyBERT: distilling BERT for natural language understanding" (2020), section 3.2.
"""

import contextlib
import dataclasses
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastbert import allocator, files
from fastbert.backends import check_environment
from fastbert.data.batch import Batch
from fastbert.data.batches import PretrainBatches
from fastbert.data.corpus import check_corpus
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import special_ids
from fastbert.distill.intermediate import IntermediateLoss
from fastbert.distill.labels import digest_of
from fastbert.distill.settings import GeneralConfig
from fastbert.distill.students import make_encoder, sizes_of
from fastbert.finetune.predict import autocast
from fastbert.finetune.run import begun, read_config, refuse_what_is_there, resume_command, settings_text
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.encoder import Encoder
from fastbert.models.frozen import freeze
from fastbert.optim.lazy_adam import LazyAdam, decay_groups
from fastbert.pretrain import snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.environment import environment, name_differences, random_state, set_random_state
from fastbert.pretrain.init import extended_tokenizer
from fastbert.pretrain.prepare import MADE_OF, check_fingerprints, fingerprints, prepare
from fastbert.pretrain.processes import Processes, check_devices, expect_same_folder, joined
from fastbert.pretrain.report import Metrics
from fastbert.pretrain.schedule import Progress, learning_rate
from fastbert.pretrain.stream import Stream
from fastbert.pretrain.together import Together
from fastbert.signals import stop_signals

STATE = "learned", "optimizer", "epoch", "index", "step", "milliseconds", "scores", "random", "environment", "data"
KEPT = 2  # snapshots


def distill_general(config: GeneralConfig, resume: bool = False) -> Path | None:
    """Trains a student to have a pretrained model's inside, on a corpus.

    Of several processes (torchrun) each takes its share of a step's batches. The student's gradients are added up; the
    teacher is in each of them, in evaluation mode and without gradients, and runs once a batch.

    Args:
        config: the run's settings.
        resume: continues the run in `config.output` from its newest snapshot, with the settings that it has; in the
            same environment the result is that of an unbroken run, bit for bit.

    Returns:
        The folder with the student, an encoder that `transformers` loads, for `fastbert distill --student` or
        `fastbert finetune --init`; None where Ctrl-C or SIGTERM stopped the run, its state saved.

    Raises:
        ValueError, OSError: settings, folders, corpus or snapshot that do not hold, before anything is trained; a
            training that diverged; a folder in which another process trains.
    """
    allocator.keep_memory()
    with joined() as processes, contextlib.ExitStack() as held:
        given = processes.first(lambda: _checked(config, resume))
        teacher = class_of(given.teacher, ENCODERS).from_pretrained(given.teacher, add_pooling_layer=False)
        if given.seq_len > teacher.config.longest:
            longest = teacher.config.longest
            raise ValueError(f"seq_len must be at most what the teacher takes, {longest}, got {given.seq_len}")
        student = make_encoder(given, teacher)
        check_devices(given.device, given.accumulate, processes, norm=student.config.norm)
        inside = IntermediateLoss.between(student, teacher, given.layer_map)
        print(sizes_of(student, teacher))
        processes.first(lambda: held.enter_context(begun(given, resume)))
        expect_same_folder(given.output, processes)
        training = _Training(given, teacher, student, inside, processes)
        training.run()
        if not training.progress.over:
            print(f"stopped after step {training.progress.step}; go on with: {resume_command(given)}")
            return None
        processes.first(training.export)
        return given.output / "model"


def _checked(config: GeneralConfig, resume: bool) -> GeneralConfig:
    """The settings, of a run that is resumed the stored ones."""
    check_environment()
    if resume:
        config = read_config(config.output, GeneralConfig)
    else:
        config.check()
        refuse_what_is_there(config.output)
        extended_tokenizer(config.as_pretraining())
        print(check_corpus(config.corpus, config.column, separator=config.separator, quoting=config.quoting))
    return config


class _Training:
    """The student's steps, from the beginning or where the newest snapshot left it.

    Attributes:
        learned: the student, and beside it a matrix that maps widths.
        progress: how far it is.
    """

    def __init__(
        self, config: GeneralConfig, teacher: Encoder, student: Encoder, inside: IntermediateLoss, processes: Processes
    ):
        self.config, self.processes = config, processes
        self.teacher = teacher.requires_grad_(False).to(config.device)
        self.student, self.inside = student.to(config.device), inside.to(config.device)
        if student.pooler is not None:
            student.pooler.requires_grad_(False)  # it is not learned here
        digest = digest_of(teacher)
        if torch.device(config.device).type == "cpu":
            freeze(teacher, torch.bfloat16 if config.bf16 else None)
        self.tokenizer, train, held_out = self._read_data()
        self.data = fingerprints(self.tokenizer, train, held_out) | {"teacher": digest}
        self.held_out = self._batches(held_out)
        self.stream = Stream(
            self._batches(train), config.workers, config.accumulate, processes.share(config.accumulate)
        )

        self.learned = nn.ModuleDict({"student": student, "inside": inside})
        processes.share_values(self.learned.parameters())
        self.optimizer = LazyAdam(decay_groups(self.learned, config.weight_decay), lr=config.lr, eps=1e-6)
        moved = [x for x in self.learned.parameters() if x.requires_grad]
        self.together = Together(processes, config.accumulate, moved)
        self.watch = Watch(config)
        self.scores: list[dict[str, float]] = []
        torch.manual_seed(config.seed)  # of dropout
        self._go_on()

    def _read_data(self) -> Any:
        """Tokenizer, training and held-out store; what an earlier try has made is used again."""
        again, settings = (self.config.output / MADE_OF).exists(), self.config.as_pretraining()
        return self.processes.first_then_others(lambda made: prepare(settings, resume=again or made))

    def _batches(self, store: TokenStore) -> PretrainBatches:
        """Whole texts: with next words as objective none is masked."""
        config = self.config
        return PretrainBatches(
            store, special_ids(self.tokenizer), seq_len=config.seq_len, batch_tokens=config.batch_tokens,
            seed=config.seed, objective="clm",
        )  # fmt: skip

    def _go_on(self) -> None:
        """From the newest snapshot, if there is one."""
        config, processes = self.config, self.processes
        clock = time.perf_counter if config.minutes is None else processes.clock  # of a run that ends by it
        state = snapshot.load(config.output / "snapshots", STATE, processes) or {}
        self.progress = Progress(
            config.steps, config.minutes, state.get("step", 0), state.get("milliseconds", 0), clock
        )
        if not state:
            return
        if state["data"].get("teacher") != self.data["teacher"]:
            raise ValueError(
                f"the teacher in {config.teacher} is another than the run in {config.output} began with: put that one "
                "back, or start a new run in another --output"
            )
        check_fingerprints(state["data"], self.data, config.output)
        name_differences(state["environment"], config)
        self.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.epoch, self.stream.index, self.scores = state["epoch"], state["index"], state["scores"]
        set_random_state(state["random"], config.device)

    def run(self) -> None:
        """Trains until the run is over, or a signal to any process stops it: its state is then in a snapshot."""
        config, progress = self.config, self.progress
        metrics = Metrics(config.output, progress.step, writes=self.processes.is_first)
        bar = tqdm(
            total=config.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True,
            disable=not self.processes.is_first,
        )  # fmt: skip
        with stop_signals() as stopped, contextlib.closing(metrics), bar:
            stop_asked, stop = self.processes.stop_asked(stopped), False
            batches = iter(self.stream)
            while not (progress.over or stop):
                lr = learning_rate(*progress.done(), config.lr, config.warmup)
                loss, norm = self._step(next(batches), lr)
                evaluated = progress.parts(config.evaluations)
                progress.advance()
                step, over, stop = progress.step, progress.over, stop_asked()
                bar.update()
                if step % config.log_every == 0 or over:
                    self.watch.look()
                    metrics.write({"step": step, "loss": loss.item(), "gradient_norm": norm.item(), "lr": lr})
                    bar.total = progress.expected_steps()
                    bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.2g}", refresh=False)
                if progress.parts(config.evaluations) > evaluated:
                    self.scores.append({"step": step, "loss": self.held_out_loss()})
                    metrics.write({"step": step, "held_out/loss": self.scores[-1]["loss"]})
                    bar.write(f"step {step}: held-out loss {self.scores[-1]['loss']:.4f}")
                if step % config.snapshot_every == 0 or over or stop:
                    self._take_snapshot()

    def _step(self, micro: list[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """The loss and the gradient's norm of all processes' batches, each of which counts by its tokens."""
        config, together, device = self.config, self.together, torch.device(self.config.device)
        self.student.train()
        counts = [batch.filled_tokens for batch in micro]
        (tokens,) = together.sums([torch.tensor(float(sum(counts)), dtype=torch.float64, device=device)])
        losses = []
        for _ in range(together.own.start):  # dropout's numbers of the batches that other processes compute
            self.student.skip_seeds(device)
        for batch, count in zip(micro, counts, strict=True):
            loss = self._loss(batch) * (count / tokens).float()
            with together.backward(batch is micro[-1]):
                loss.backward()
            losses.append(loss.detach())
        for _ in range(config.accumulate - together.own.stop):
            self.student.skip_seeds(device)
        (loss,) = together.sums([torch.stack(losses).sum()])
        norm, factor = self.optimizer.clip_factor(config.clip)
        self.watch.see(self.progress.step + 1, loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_factor=factor)
        self.optimizer.zero_grad()
        return loss, norm

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self.config.device)
        arguments = {name: getattr(batch, name) for name in ("input_ids", "token_type_ids", "cu_seqlens", "max_seqlen")}
        with autocast(self.config):
            return self.inside.of_batch(self.student, self.teacher, arguments)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean over held-out batches, of which each process takes its share, each counted by its tokens."""
        self.student.eval()
        numbers = list(itertools.islice(self.held_out.numbers(), self.config.evaluation_batches))
        sums = torch.zeros(2, dtype=torch.float64, device=self.config.device)
        for place in self.processes.share(len(numbers)):
            batch = self.held_out[numbers[place]]
            sums += torch.stack(
                [self._loss(batch).double() * batch.filled_tokens, sums.new_tensor(batch.filled_tokens)]
            )
        (sums,) = self.together.sums([sums])
        return (sums[0] / sums[1]).item()

    def _take_snapshot(self) -> None:
        config, progress = self.config, self.progress
        self.watch.look()
        state = {
            "learned": self.learned.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.stream.epoch,
            "index": self.stream.index, "step": progress.step, "milliseconds": progress.milliseconds,
            "scores": self.scores, "random": random_state(config.device), "environment": environment(config),
            "data": self.data,
        }  # fmt: skip
        self.watch.state(progress.step, state, self.processes)
        snapshot.save(config.output / "snapshots", progress.step, state, KEPT, self.processes)

    def export(self) -> None:
        """Writes `model/` and `scores.json`, which says that the run has ended, and removes its snapshots."""
        config, folder = self.config, self.config.output
        self.student.save_pretrained(folder / "model", tokenizer=self.tokenizer)
        content = {"settings": dataclasses.asdict(config), "held out": self.scores}
        files.write(folder, {"scores.json": settings_text(content)})
        shutil.rmtree(folder / "snapshots", ignore_errors=True)
        print(f"model     {folder / 'model'}  ({self.student.loaded_by})")
        print(f"metrics   {folder / 'metrics.jsonl'}, tensorboard --logdir {folder}")
