"""From raw text to a model that `transformers` loads: what `fastbert pretrain` runs, in the order it happens.

A run's folder holds everything: `tokenizer/`, `data/{train,held_out}/`, `dictionary.txt` where the run has one, `init/`
where it goes on from a model, `config.json`, `snapshots/`, `metrics.jsonl`, `tensorboard/`, `loss.png` and, at the end,
`model/` in Hugging Face's format. `config.json` makes it a run, which can be resumed from then on; it is written when
the data is there and holds.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastbert import allocator
from fastbert.backends.gpu import check_device_errors
from fastbert.data.batches import Batch, PretrainBatches
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import continuations, special_ids
from fastbert.pretrain import lock, snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.environment import environment, name_differences, random_state, set_random_state
from fastbert.pretrain.evaluate import Frequencies, evaluate, guesses
from fastbert.pretrain.init import take_settings, write_copy
from fastbert.pretrain.meter import Meter
from fastbert.pretrain.phases import current_phase
from fastbert.pretrain.prepare import check_fingerprints, fingerprints, prepare, prepare_dictionary
from fastbert.pretrain.report import Metrics, last_scores, plot_loss, read_metrics, shown, summary
from fastbert.pretrain.run import new_run, refuse_a_second_run, refuse_many_processes, resumed_run, write_config
from fastbert.pretrain.schedule import Progress, learning_rate
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.signals import obey_the_parent_alone, stop_signals
from fastbert.pretrain.start import starting_model
from fastbert.pretrain.step import make_optimizer, make_step, pair, products, train_words

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

    def batches(store: TokenStore, seq_len: int, static: bool = False) -> PretrainBatches:
        return PretrainBatches(
            store, special_ids(tokenizer), seq_len=seq_len, batch_tokens=config.batch_tokens, seed=config.seed,
            objective=config.objective, inputs=config.inputs, static=static,
            unit="word" if config.masking == "token" else config.masking,
            continues=None if config.masking == "token" else continuations(tokenizer), dictionary=dictionary,
        )  # fmt: skip

    phases = config.all_phases()
    train = [batches(train_store, each.seq_len, config.static_shapes) for each in phases]
    held_out = [batches(held_out_store, each.seq_len) for each in phases]
    for each in train:
        say_shape(each)
    frequencies = Frequencies(train_store.token_counts())
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

    # where the run stands
    phase, tokens, progress = 0, 0, Progress(config.steps, config.minutes)
    state = snapshot.load(folder / "snapshots", STATE)
    if state is not None:
        check_fingerprints(state["data"], data, folder)
        name_differences(state["environment"], config)
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{folder / 'config.json'} describes another model than the snapshot: {error}") from error
        optimizer.load_state_dict(state["optimizer"])
        phase, tokens = state.get("phase", 0), state["tokens"]
        progress = Progress(config.steps, config.minutes, state["step"], state.get("milliseconds", 0))
        set_random_state(state["random"], config.device)
    stream = Stream(train[phase], config.workers)
    if state is not None:
        stream.epoch, stream.index = state["epoch"], state["index"]

    def held_out_scores() -> dict[str, float]:
        with products(config):
            scores = evaluate(
                model, held_out[phase], config.evaluation_batches, frequencies, config.device, pair(config)
            )
        return scores | {"seq_len": phases[phase].seq_len}

    def take_snapshot() -> None:
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": stream.epoch,
            "index": stream.index, "phase": phase, "step": progress.step, "milliseconds": progress.milliseconds,
            "tokens": tokens, "random": random_state(config.device), "environment": environment(config), "data": data,
        }  # fmt: skip
        watch.look()
        check_device_errors()
        watch.state(progress.step, state)
        snapshot.save(folder / "snapshots", progress.step, state, config.keep)

    # the loop
    watch = Watch(config)
    take_step = make_step(model, optimizer, config, watch)
    meter = Meter(config, model.config)
    print(meter)
    metrics = Metrics(folder, progress.step)
    bar = tqdm(total=config.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True)
    scores: dict[str, float] = {}
    batch = iter(stream)
    meter.start()
    with stop_signals() as stopped, contextlib.closing(metrics), bar:
        while not (progress.over or stopped):
            if current_phase(phases, *progress.done()) > phase:
                phase = current_phase(phases, *progress.done())
                stream = stream.followed_by(train[phase])
                batch = iter(stream)
                bar.write(f"from step {progress.step + 1} on: sequences of up to {phases[phase].seq_len} tokens")
            with meter.waiting():
                micro = [next(batch) for _ in range(config.accumulate)]
            meter.count(micro)
            lr = learning_rate(
                *progress.done(), config.lr, config.warmup, config.schedule,
                power=config.power, decay=config.decay, final=config.final_lr,
            )  # fmt: skip
            if progress.step < config.rows_first:
                record = train_words(new_rows, model, optimizer, micro, lr, config, watch, progress.step + 1)
            else:
                record = take_step(micro, lr, progress.step + 1)
            evaluated = progress.parts(config.evaluations)
            progress.advance()
            step, over = progress.step, progress.over
            tokens += sum(each.filled_tokens for each in micro)
            bar.update()
            if step % config.log_every == 0 or over:
                watch.look()
                record = {name: float(value) for name, value in record.items()}
                used = meter.used()
                metrics.write({"step": step, **record, "tokens": tokens, **used})
                postfix = {"loss": f"{record['loss']:.3f}", "lr": f"{lr:.2g}"}
                postfix["tokens/s"] = f"{used['tokens_per_second']:,}"
                if used["waiting"] > WORTH_SAYING:
                    postfix["waits for data"] = f"{used['waiting']:.0%}"
                if scores:
                    postfix["held-out"] = shown(scores["mlm_loss"], ".3f")
                bar.total = progress.expected_steps()
                bar.set_postfix(postfix, refresh=False)
                meter.start()
            if progress.parts(config.evaluations) > evaluated:
                watch.look()
                scores = held_out_scores()
                metrics.write({"step": step, **{f"held_out/{name}": value for name, value in scores.items()}})
                watch.scores(step, scores)
                meter.start()
            if step % config.snapshot_every == 0 or over or stopped:
                take_snapshot()
                meter.start()
    if not progress.over:
        take_snapshot()
        print(
            f"stopped by {stopped[0]} after step {progress.step} of {progress.expected_steps()}; go on with: "
            f"{resume_command(config)}"
        )
        return None

    # what came of it
    model.save_pretrained(folder / "model", tokenizer=tokenizer)
    records = read_metrics(folder / "metrics.jsonl")
    start = config.preset if config.init is None else f"from {config.init.name}"
    title = f"{config.model} {start}, {config.embedding_update} rows, {tokens / 1e6:.1f} M tokens"
    plot_loss(records, folder / "loss.png", title)
    print(summary(scores or last_scores(records) or held_out_scores()))
    print(guesses(model, held_out[phase], tokenizer, config.device))
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
                batches, batch_size=None, sampler=range(self.index, len(batches)), num_workers=self.workers,
                generator=torch.Generator(), worker_init_fn=obey_the_parent_alone,
            )  # fmt: skip
            for batch in loader:
                self.index += 1
                yield batch
            self.epoch, self.index = self.epoch + 1, 0

    def followed_by(self, batches: PretrainBatches) -> "Stream":
        """Other batches from here on, from the next epoch's first, so that no random number is drawn twice."""
        stream = Stream(batches, self.workers)
        stream.epoch = self.epoch + 1
        return stream


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
