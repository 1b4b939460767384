"""From raw text to a model that `transformers` loads: what `fastbert pretrain` runs, in the order it happens.

A run's folder holds everything: `tokenizer/`, `data/` with its token store, `dictionary.txt` where the run has one,
`init/` where it goes on from a model, `config.json`, `snapshots/`, `metrics.jsonl`, `tensorboard/`, `loss.png` and, at
the end, `model/` in Hugging Face's format. `config.json` makes it a run, which can be resumed from then on; it is
written when the data is there and holds.
"""

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastbert import allocator, lock
from fastbert.backends.gpu import check_device_errors
from fastbert.data.batches import PretrainBatches
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import continuations, special_ids
from fastbert.models.pretraining import PreTrainingModel
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.pretrain import shards, snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.environment import environment, name_differences, random_state, set_random_state
from fastbert.pretrain.evaluate import Frequencies, evaluate, guesses
from fastbert.pretrain.init import take_settings, write_copy
from fastbert.pretrain.meter import Meter
from fastbert.pretrain.phases import current_phase
from fastbert.pretrain.prepare import check_fingerprints, fingerprints, prepare
from fastbert.pretrain.processes import Processes, check_devices, expect_same_folder, joined
from fastbert.pretrain.report import Metrics, last_scores, plot_loss, read_metrics, shown, summary
from fastbert.pretrain.run import new_run, refuse_a_second_run, resumed_run, write_config
from fastbert.pretrain.schedule import Progress, learning_rate
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.split import group_of_one, split, whole
from fastbert.pretrain.start import starting_model
from fastbert.pretrain.step import make_optimizer, make_step, pair, products, train_words
from fastbert.pretrain.stream import Stream
from fastbert.pretrain.together import Together
from fastbert.signals import stop_signals

STATE = "model", "optimizer", "epoch", "index", "step", "tokens", "random", "environment", "data"  # of a snapshot
WORTH_SAYING = 0.05  # of the time


def pretrain(config: PretrainConfig, resume: bool = False) -> Path | None:
    """Trains a BERT, ALBERT, RoBERTa or ERNIE on a corpus and exports it.

    Args:
        config: the run's settings.
        resume: continues the run in `config.output` from its newest snapshot.

    Returns:
        The folder with the exported model; None where Ctrl-C or SIGTERM stopped the run, its state saved.

    Raises:
        ValueError, TypeError, OSError: settings, corpus, data or snapshot that do not hold, a run that diverged, a
            folder in which another process trains; the message says what to do.
    """
    allocator.keep_memory()
    with joined() as processes, contextlib.ExitStack() as held:

        def begin() -> PretrainConfig:
            settings = take_settings(config) if config.init is not None and not resume else config
            settings = resumed_run(config.output) if resume else new_run(settings)
            check_devices(settings.device, settings.accumulate, processes, settings.shard)
            config.output.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock.hold(config.output))
            return settings

        begun = processes.first(begin)
        if begun.shard:
            held.enter_context(group_of_one())
        return _pretrain(begun, resume, processes)


def _pretrain(config: PretrainConfig, resume: bool, processes: Processes) -> Path | None:
    """`pretrain` with checked settings, alone in the run's folder but for the other processes of the run."""
    folder = config.output
    expect_same_folder(folder, processes)

    # data
    if not resume:
        processes.first(lambda: refuse_a_second_run(folder))  # again: another run may have ended since
    tokenizer, train_store, held_out_store = processes.first_then_others(lambda made: prepare(config, resume or made))

    def batches(store: TokenStore, seq_len: int, static: bool = False) -> PretrainBatches:
        return PretrainBatches(
            store, special_ids(tokenizer), seq_len=seq_len, batch_tokens=config.batch_tokens, seed=config.seed,
            objective=config.objective, inputs=config.inputs, static=static,
            unit="word" if config.masking == "token" else config.masking,
            continues=None if config.masking == "token" else continuations(tokenizer),
            task_type=config.task_type,
        )  # fmt: skip

    phases = config.all_phases()
    train = [batches(train_store, each.seq_len, config.static_shapes) for each in phases]
    held_out = [batches(held_out_store, each.seq_len) for each in phases]
    for each in train:
        say_shape(each)
    frequencies = Frequencies(torch.from_numpy(train_store.token_counts()))
    data = fingerprints(tokenizer, train_store, held_out_store)
    if not resume:
        if config.init is not None:
            processes.first(lambda: write_copy(config, tokenizer))
        processes.first(lambda: write_config(config))  # from here on it is a run

    # model and optimizer
    torch.manual_seed(config.seed)
    model, new_rows = starting_model(config, tokenizer, frequencies)
    model, new_rows = model.to(config.device), new_rows.to(config.device)
    model.base_model.checkpoint_layers = config.checkpoint_layers
    processes.share_values(model.parameters())  # which were drawn alike, if all processors draw alike
    if config.shard:
        split(model, config)
    optimizer = make_optimizer(model, config)

    # where the run stands
    clock = time.perf_counter if config.minutes is None else processes.clock  # of a run that ends by it
    phase, tokens, progress = 0, 0, Progress(config.steps, config.minutes, clock=clock)
    state = snapshot.load(folder / "snapshots", STATE, processes)
    if state is not None:
        check_fingerprints(state["data"], data, folder)
        name_differences(state["environment"], config)
        load_trained(state, model, optimizer, folder, processes)
        phase, tokens = state.get("phase", 0), state["tokens"]
        progress = Progress(config.steps, config.minutes, state["step"], state.get("milliseconds", 0), clock)
        set_random_state(state["random"], config.device)
    stream = Stream(train[phase], config.workers, config.accumulate, processes.share(config.accumulate))
    if state is not None:
        stream.epoch, stream.index = state["epoch"], state["index"]

    def held_out_scores() -> dict[str, float]:
        with products(config):
            scores = evaluate(
                model, held_out[phase], config.evaluation_batches, frequencies, config.device, pair(config), processes
            )
        return scores | {"seq_len": phases[phase].seq_len}

    own_tokens = 0  # of this process, not yet counted among those of all

    def count_tokens() -> None:
        nonlocal tokens, own_tokens
        tokens += processes.total(own_tokens)
        own_tokens = 0

    def take_snapshot() -> None:
        count_tokens()
        trained = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state = {
            "epoch": stream.epoch, "index": stream.index, "phase": phase, "step": progress.step,
            "milliseconds": progress.milliseconds, "tokens": tokens, "random": random_state(config.device),
            "environment": environment(config), "data": data,
        }  # fmt: skip
        watch.look()
        check_device_errors()
        watch.state(progress.step, trained, processes)
        where = folder / "snapshots", progress.step
        if processes.count == 1 and not config.shard:
            snapshot.save(*where, trained | state, config.keep)
        else:
            snapshot.save(*where, state, config.keep, processes, functools.partial(shards.save, model, optimizer))

    # the loop
    watch = Watch(config)
    take_step = make_step(model, optimizer, config, watch, processes)
    meter = Meter(config, model.config)
    print(meter)
    words_alone = Together(processes, config.accumulate)  # of steps that train new words, exchanged by their rows
    metrics = Metrics(folder, progress.step, writes=processes.is_first)
    bar = tqdm(
        total=config.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True,
        disable=not processes.is_first,
    )  # fmt: skip
    scores: dict[str, float] = {}
    batch = iter(stream)
    meter.start(tokens)
    with stop_signals() as stopped, contextlib.closing(metrics), bar:
        stop_asked, stop = processes.stop_asked(stopped), False
        while not (progress.over or stop):
            if current_phase(phases, *progress.done()) > phase:
                phase = current_phase(phases, *progress.done())
                stream = stream.followed_by(train[phase])
                batch = iter(stream)
                bar.write(f"from step {progress.step + 1} on: sequences of up to {phases[phase].seq_len} tokens")
            with meter.waiting():
                micro = next(batch)
            meter.count(micro)
            lr = learning_rate(
                *progress.done(), config.lr, config.warmup, config.schedule,
                power=config.power, decay=config.decay, final=config.final_lr,
            )  # fmt: skip
            if progress.step < config.rows_first:
                numbers = lr, config, watch, progress.step + 1
                record = train_words(new_rows, model, optimizer, micro, *numbers, together=words_alone)
            else:
                record = take_step(micro, lr, progress.step + 1)
            evaluated = progress.parts(config.evaluations)
            progress.advance()
            step, over, stop = progress.step, progress.over, stop_asked()
            own_tokens += sum(each.filled_tokens for each in micro)
            bar.update()
            if step % config.log_every == 0 or over:
                watch.look()
                count_tokens()
                record = {name: float(value) for name, value in record.items()}
                used = meter.used(tokens)
                metrics.write({"step": step, **record, "seq_len": phases[phase].seq_len, "tokens": tokens, **used})
                postfix = {"loss": f"{record['loss']:.3f}", "lr": f"{lr:.2g}"}
                postfix["tokens/s"] = f"{used['tokens_per_second']:,}"
                if used["waiting"] > WORTH_SAYING:
                    postfix["waits for data"] = f"{used['waiting']:.0%}"
                if scores:
                    postfix["held-out"] = shown(scores["mlm_loss"], ".3f")
                bar.total = progress.expected_steps()
                bar.set_postfix(postfix, refresh=False)
                meter.start(tokens)
            if progress.parts(config.evaluations) > evaluated:
                watch.look()
                count_tokens()
                scores = held_out_scores()
                metrics.write({"step": step, **{f"held_out/{name}": value for name, value in scores.items()}})
                watch.scores(step, scores)
                meter.start(tokens)
            if step % config.snapshot_every == 0 or over or stop:
                take_snapshot()
                meter.start(tokens)
    if not progress.over:
        print(
            f"stopped by {stopped[0] if stopped else 'a signal to another process'} after step {progress.step} of "
            f"{progress.expected_steps()}; go on with: {resume_command(config)}"
        )
        return None

    # what came of it
    metrics_at = folder / "metrics.jsonl"
    scores = scores or processes.first(lambda: last_scores(read_metrics(metrics_at))) or held_out_scores()

    if config.shard:
        model = whole(model, config).to(config.device)

    def export() -> None:
        model.save_pretrained(folder / "model", tokenizer=tokenizer)
        start = config.preset if config.init is None else f"from {config.init.name}"
        title = f"{config.model} {start}, {config.embedding_update} rows, {tokens / 1e6:.1f} M tokens"
        plot_loss(read_metrics(metrics_at), folder / "loss.png", title)
        print(summary(scores))
        print(guesses(model, held_out[phase], tokenizer, config.device))
        print(f"\nmodel     {folder / 'model'}  (transformers.{type(model).__name__}.from_pretrained loads it)")
        print(f"curve     {folder / 'loss.png'}\nmetrics   {metrics_at}, tensorboard --logdir {folder}")

    processes.first(export)
    return folder / "model"


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


def say_shape(batches: PretrainBatches) -> None:
    """Prints the one shape of static batches."""
    if batches.shape is not None:
        tokens, samples, masked = batches.shape
        print(
            f"static shapes: {tokens:,} tokens, {samples} sequences and {masked} predictions in every batch; "
            f"{batches.empty_share:.1%} of the tokens is padding"
        )


def resume_command(config: PretrainConfig) -> str:
    return f"fastbert pretrain --output {config.output} --resume"
