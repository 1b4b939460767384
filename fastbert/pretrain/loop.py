"""From raw text to a model that `transformers` loads: what `fastbert pretrain` runs, in the order it happens.

A run's folder holds everything: `tokenizer/`, `data/` with its token store, `dictionary.txt` where the run has one,
`init/` where it goes on from a model, `config.json`, `snapshots/`, `metrics.jsonl`, `tensorboard/`, `loss.png` and, at
the end, `model/` in Hugging Face's format. `config.json` makes it a run, which can be resumed from then on; it is
written when the data is there and holds.
"""

import contextlib
from pathlib import Path

import torch

from fastbert import allocator, lock
from fastbert.data.batches import PretrainBatches
from fastbert.data.permutation import SHARE
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import continuations, special_ids
from fastbert.pretrain.evaluate import Frequencies, guesses
from fastbert.pretrain.init import take_settings, write_copy
from fastbert.pretrain.prepare import fingerprints, prepare
from fastbert.pretrain.processes import Processes, check_devices, expect_same_folder, joined
from fastbert.pretrain.report import last_scores, plot_loss, read_metrics, summary
from fastbert.pretrain.run import new_run, refuse_a_second_run, resumed_run, write_config
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.split import group_of_one, whole
from fastbert.pretrain.training import Data, Training


def pretrain(config: PretrainConfig, resume: bool = False) -> Path | None:
    """Trains a BERT, ALBERT, RoBERTa, ERNIE or ELMo on a corpus and exports it.

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
            check_devices(settings.device, settings.accumulate, processes, settings.shard, settings.norm)
            if settings.sampled is not None and processes.count > 1:
                raise ValueError(
                    f"with --sampled the softmax's gradients are sparse, which several processes do not add up here: "
                    f"start one process in place of {processes.count}, or leave --sampled out"
                )
            held.enter_context(lock.hold(config.output))
            return settings

        begun = processes.first(begin)
        if begun.shard:
            held.enter_context(group_of_one())
        expect_same_folder(begun.output, processes)
        training = Training(begun, read_data(begun, resume, processes), processes)
        training.run()
        if training.stopped is not None:
            print(
                f"stopped by {training.stopped} after step {training.progress.step} of "
                f"{training.progress.expected_steps()}; go on with: {resume_command(begun)}"
            )
            return None
        export(training)
        return begun.output / "model"


def read_data(config: PretrainConfig, resume: bool, processes: Processes) -> Data:
    """The run's data, made by one process where it is not there; the folder is then a run's, which can be resumed."""
    if not resume:
        processes.first(lambda: refuse_a_second_run(config.output))  # again: another run may have ended since
    tokenizer, train_store, held_out_store = processes.first_then_others(lambda made: prepare(config, resume or made))

    def batches(store: TokenStore, seq_len: int, static: bool = False) -> PretrainBatches:
        return PretrainBatches(
            store, special_ids(tokenizer), seq_len=seq_len, batch_tokens=config.batch_tokens, seed=config.seed,
            objective=config.objective, inputs=config.inputs, static=static,
            unit="word" if config.masking == "token" else config.masking,
            continues=None if config.masking == "token" else continuations(tokenizer),
            task_type=config.task_type, **({"mask_prob": SHARE} if config.objective == "plm" else {}),
        )  # fmt: skip

    phases = config.all_phases()
    train = [batches(train_store, each.seq_len, config.static_shapes) for each in phases]
    held_out = [batches(held_out_store, each.seq_len) for each in phases]
    for each in train:
        say_shape(each)
    frequencies = Frequencies(torch.from_numpy(train_store.token_counts()))
    data = Data(tokenizer, train, held_out, frequencies, fingerprints(tokenizer, train_store, held_out_store))
    if not resume:
        if config.init is not None:
            processes.first(lambda: write_copy(config, tokenizer))
        processes.first(lambda: write_config(config))  # from here on it is a run
    return data


def export(training: Training) -> None:
    """Writes `model/` and `loss.png` and says what came of the run."""
    config, processes, tokenizer = training.config, training.processes, training.data.tokenizer
    folder, metrics_at = config.output, config.output / "metrics.jsonl"
    scores = training.scores or processes.first(lambda: last_scores(read_metrics(metrics_at)))
    scores = scores or training.held_out_scores()
    model = whole(training.model, config).to(config.device) if config.shard else training.model

    def write() -> None:
        model.save_pretrained(folder / "model", tokenizer=tokenizer)
        start = config.preset if config.init is None else f"from {config.init.name}"
        title = f"{config.model} {start}, {config.embedding_update} rows, {training.tokens / 1e6:.1f} M tokens"
        plot_loss(read_metrics(metrics_at), folder / "loss.png", title)
        print(summary(scores))
        print(guesses(model, training.data.held_out[training.phase], tokenizer, config.device))
        print(f"\nmodel     {folder / 'model'}  ({model.loaded_by})")
        print(f"curve     {folder / 'loss.png'}\nmetrics   {metrics_at}, tensorboard --logdir {folder}")

    processes.first(write)


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
