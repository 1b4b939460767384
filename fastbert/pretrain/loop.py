"""From raw text to a model that `transformers` loads: what `fastbert pretrain` runs, in the order it happens.

A run's folder holds everything: `tokenizer/`, `data/{train,held_out}/`, `dictionary.txt` where the run has one, `init/`
where it goes on from a model, `config.json`, `snapshots/`, `metrics.jsonl`, `tensorboard/`, `loss.png` and, at the end,
`model/` in Hugging Face's format. `config.json` makes it a run, which can be resumed from then on; it is written when
the data is there and holds.
"""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastbert import allocator, lock
from fastbert.backends.gpu import check_device_errors
from fastbert.data.batches import Batch, PretrainBatches
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import continuations, special_ids
from fastbert.models.pretraining import PreTrainingModel
from fastbert.pretrain import snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.evaluate import Frequencies, evaluate, guesses
from fastbert.pretrain.init import take_settings, write_copy
from fastbert.pretrain.prepare import check_fingerprints, fingerprints, prepare, prepare_dictionary
from fastbert.pretrain.report import Metrics, last_scores, plot_loss, read_metrics, shown, summary
from fastbert.pretrain.run import (
    PretrainConfig,
    environment,
    name_differences,
    new_run,
    random_state,
    refuse_a_second_run,
    refuse_many_processes,
    resumed_run,
    set_random_state,
    write_config,
)
from fastbert.pretrain.schedule import evaluation_steps, learning_rate, steps_in_time, steps_that_fit
from fastbert.pretrain.signals import obey_the_parent_alone, stop_signals
from fastbert.pretrain.start import starting_model
from fastbert.pretrain.step import make_optimizer, make_step, pair, products, train_words

STATE = "model", "optimizer", "epoch", "index", "step", "tokens", "random", "environment", "data"  # of a snapshot


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
    refuse_many_processes()
    allocator.keep_memory()
    if config.init is not None and not resume:
        config = take_settings(config)
    config = resumed_run(config.output) if resume else new_run(config)
    config.output.mkdir(parents=True, exist_ok=True)
    with lock.hold(config.output):
        return _pretrain(config, resume)


def _pretrain(config: PretrainConfig, resume: bool) -> Path | None:
    """`pretrain` with checked settings, alone in the run's folder."""
    folder = config.output

    # data
    if not resume:
        refuse_a_second_run(folder)  # again: another process may have ended one since
    tokenizer, train_store, held_out_store = prepare(config, resume)
    dictionary = prepare_dictionary(config, resume, tokenizer)

    def batches(store: TokenStore, static: bool = False) -> PretrainBatches:
        return PretrainBatches(
            store, special_ids(tokenizer), seq_len=config.seq_len, batch_tokens=config.batch_tokens, seed=config.seed,
            objective=config.objective, inputs=config.inputs, static=static,
            unit="word" if config.masking == "token" else config.masking,
            continues=None if config.masking == "token" else continuations(tokenizer), dictionary=dictionary,
        )  # fmt: skip

    train, held_out = batches(train_store, config.static_shapes), batches(held_out_store)
    if train.shape is not None:
        print(
            f"static shapes: {train.shape.tokens:,} tokens, {train.shape.samples} sequences and {train.shape.masked} "
            f"predictions in every batch; {train.empty_share:.1%} of the tokens is padding"
        )
    frequencies = Frequencies(torch.from_numpy(train_store.token_counts()))
    data = fingerprints(tokenizer, train_store, held_out_store, dictionary)
    if not resume:
        if config.init is not None:
            write_copy(config, tokenizer)
        write_config(config)  # from here on it is a run

    # model and optimizer
    torch.manual_seed(config.seed)
    model, new_rows = starting_model(config, tokenizer, frequencies)
    model, new_rows = model.to(config.device), new_rows.to(config.device)
    model.base_model.checkpoint_layers = config.checkpoint_layers
    optimizer = make_optimizer(model, config)
    stream = Stream(train, config.workers)

    def held_out_scores() -> dict[str, float]:
        with products(config):
            return evaluate(model, held_out, config.evaluation_batches, frequencies, config.device, pair(config))

    # where the run stands
    step = tokens = 0
    state = snapshot.load(folder / "snapshots", STATE)
    if state is not None:
        check_fingerprints(state["data"], data, folder)
        name_differences(state["environment"], config)
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{folder / 'config.json'} describes another model than the snapshot: {error}") from error
        optimizer.load_state_dict(state["optimizer"])
        stream.epoch, stream.index = state["epoch"], state["index"]
        step, tokens = state["step"], state["tokens"]
        set_random_state(state["random"], config.device)
    if config.steps is None or (config.minutes is not None and not resume):
        config = dataclasses.replace(config, steps=steps_within(config, model, train, held_out_scores))
        write_config(config)
    evaluate_at = evaluation_steps(config.steps, config.evaluations)

    def take_snapshot() -> None:
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": stream.epoch,
            "index": stream.index, "step": step, "tokens": tokens, "random": random_state(config.device),
            "environment": environment(config), "data": data,
        }  # fmt: skip
        watch.look()
        check_device_errors()
        watch.state(step, state)
        snapshot.save(folder / "snapshots", step, state, config.keep)

    # the loop
    watch = Watch(config)
    take_step = make_step(model, optimizer, config, watch)
    metrics = Metrics(folder, step)
    bar = tqdm(total=config.steps, initial=step, unit="step", desc="training", dynamic_ncols=True)
    scores: dict[str, float] = {}
    first, began = step, time.perf_counter()
    allowed = None if config.minutes is None else 60 * config.minutes * (1 - step / config.steps)  # for this process
    clock, tokens_then = began, tokens
    batch = iter(stream)
    with stop_signals() as stopped, contextlib.closing(metrics), bar:
        while step < config.steps and not stopped:
            micro = [next(batch) for _ in range(config.accumulate)]
            lr = learning_rate(step, config.steps, config.lr, config.warmup)
            if step < config.rows_first:
                record = train_words(new_rows, model, optimizer, micro, lr, config, watch, step + 1)
            else:
                record = take_step(micro, lr, step + 1)
            step += 1
            tokens += sum(each.filled_tokens for each in micro)
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                watch.look()
                seconds = time.perf_counter() - clock
                record = {name: float(value) for name, value in record.items()}
                speed = (tokens - tokens_then) / seconds
                metrics.write({"step": step, **record, "tokens": tokens, "tokens_per_second": round(speed)})
                postfix = {"loss": f"{record['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
                if scores:
                    postfix["held-out"] = shown(scores["mlm_loss"], ".3f")
                bar.set_postfix(postfix, refresh=False)
                clock, tokens_then = time.perf_counter(), tokens
            if step in evaluate_at:
                watch.look()
                scores = held_out_scores()
                metrics.write({"step": step, **{f"held_out/{name}": value for name, value in scores.items()}})
                watch.scores(step, scores)
                clock, tokens_then = time.perf_counter(), tokens
            if step % config.snapshot_every == 0 or step == config.steps or stopped:
                take_snapshot()
                clock, tokens_then = time.perf_counter(), tokens
            if allowed is not None and step < config.steps and step % config.log_every == 0:
                steps = steps_in_time(config.steps, step, step - first, time.perf_counter() - began, allowed)
                if steps < config.steps:
                    bar.write(f"{config.minutes:g} minutes have become too short: {steps} steps, not {config.steps}")
                    config = dataclasses.replace(config, steps=steps)
                    write_config(config)
                    bar.total, evaluate_at = steps, evaluation_steps(steps, config.evaluations)
    if step < config.steps:
        take_snapshot()
        print(f"stopped by {stopped[0]} after step {step} of {config.steps}; go on with: {resume_command(config)}")
        return None

    # what came of it
    model.save_pretrained(folder / "model", tokenizer=tokenizer)
    records = read_metrics(folder / "metrics.jsonl")
    start = config.preset if config.init is None else f"from {config.init.name}"
    title = f"{config.model} {start}, {config.embedding_update} rows, {tokens / 1e6:.1f} M tokens"
    plot_loss(records, folder / "loss.png", title)
    print(summary(scores or last_scores(records) or held_out_scores()))
    print(guesses(model, held_out, tokenizer, config.device))
    print(f"\nmodel     {folder / 'model'}  (transformers.{type(model).__name__}.from_pretrained loads it)")
    print(f"curve     {folder / 'loss.png'}\nmetrics   {folder / 'metrics.jsonl'}, tensorboard --logdir {folder}")
    return folder / "model"


class Stream:
    """Batches of epoch after epoch, and where it stands: the next batch is number `index` of `epoch`."""

    def __init__(self, batches: PretrainBatches, workers: int):
        self.batches, self.workers = batches, workers
        self.epoch = self.index = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batches = self.batches.at_epoch(self.epoch)
            # A generator of its own: the loader draws from it, and torch's default one is part of what resumes.
            loader = DataLoader(
                batches, batch_size=None, sampler=batches.numbers(self.index), num_workers=self.workers,
                generator=torch.Generator(), worker_init_fn=obey_the_parent_alone,
            )  # fmt: skip
            for batch in loader:
                self.index += 1
                yield batch
            self.epoch, self.index = self.epoch + 1, 0


def steps_within(
    config: PretrainConfig, model: PreTrainingModel, batches: PretrainBatches, scores: Callable[[], object]
) -> int:
    """Steps that fit into `config.minutes` with their evaluations, measured on copies of model and optimizer.

    Not more than `config.steps`, where that is given too.
    """
    trial = copy.deepcopy(model)
    optimizer = make_optimizer(trial, config)
    take_step = make_step(trial, optimizer, config)
    stream = iter(Stream(batches, 0))
    times = []
    with torch.random.fork_rng():
        while len(times) < 5 or (sum(times) < 5 and len(times) < 100):
            start = time.perf_counter()
            record = take_step([next(stream) for _ in range(config.accumulate)], config.lr, len(times))
            float(record["loss"])  # is there when the step is done
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        scores()
        evaluation = time.perf_counter() - start
    usual = statistics.median(times[2:])  # the first steps also warm up; a busy moment must not cut the run short
    fitting = steps_that_fit(60 * config.minutes, usual, evaluation, config.evaluations)
    steps = fitting if config.steps is None else min(fitting, config.steps)
    minutes = (steps * usual + config.evaluations * evaluation) / 60
    asked = f" of the {config.steps} asked for" if config.steps is not None and steps < config.steps else ""
    print(
        f"{steps} steps of {1000 * usual:.0f} ms{asked} and {config.evaluations} evaluations: about {minutes:.2g} "
        f"minutes, {config.minutes:g} allowed"
    )
    return steps


def resume_command(config: PretrainConfig) -> str:
    return f"fastbert pretrain --output {config.output} --resume"
