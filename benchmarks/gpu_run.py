"""A whole run of `fastbert pretrain` on a GPU beside its bare step: what reading, logging, evaluating and saving cost.

    python benchmarks/gpu_run.py [--minutes 10] [--layers 4] [--workers 4] [--device cuda] [--quick]

A BERT of base width and four layers learns masked words and next sentences from the film reviews, in bfloat16 with
dropout 0.1, its step captured as one CUDA graph. The run's tokens are those that are no padding, over all of its
training time: its first steps and their capture, evaluations and snapshots are in it. The bare step is the same one,
taken again and again on batches that are there; the median of windows. Beside the CSV file lies the run's curve.
--device cpu --quick is a tiny run of a few steps: does it run?
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from reviews import reviews
from timing import results_path, synchronize, write_csv

from fastbert import BertConfig, BertForPreTraining
from fastbert.data import iter_documents, train_tokenizer
from fastbert.pretrain import snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.loop import pretrain, read_data
from fastbert.pretrain.processes import ALONE
from fastbert.pretrain.report import read_metrics
from fastbert.pretrain.run import read_config
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.step import make_optimizer, make_step
from fastbert.pretrain.stream import Stream

LAST = 5  # warm-up, capture, and a replay
BATCHES, WINDOWS = 32, 9


def write_start(options: argparse.Namespace, folder: Path) -> None:
    """A model that knows nothing, of a depth that no preset has, and its tokenizer."""
    texts = itertools.chain.from_iterable(iter_documents(options.corpus, "text"))
    tokenizer = train_tokenizer(texts, 8192)
    torch.manual_seed(0)
    config = BertConfig.preset(
        options.preset, num_hidden_layers=options.layers, vocab_size=tokenizer.get_vocab_size(),
    )  # fmt: skip
    BertForPreTraining(config).save_pretrained(folder, tokenizer=tokenizer)


def settings(options: argparse.Namespace, folder: Path) -> PretrainConfig:
    """Logs, evaluations and snapshots are as rare as steps of a few milliseconds want them."""
    length = {"steps": 8} if options.quick else {"minutes": options.minutes}
    return PretrainConfig(
        output=folder / "run", init=folder / "start", corpus=options.corpus, column="text", lr=5e-4, bf16=True,
        batch_tokens=options.batch_tokens, workers=options.workers, device=options.device,
        log_every=4 if options.quick else 200, snapshot_every=50_000, evaluations=2 if options.quick else 8,
        evaluation_batches=2 if options.quick else 32, **length,
    )  # fmt: skip


def of_run(config: PretrainConfig) -> dict[str, float]:
    """Tokens a second, of all of the training time and between the lines of the metrics; the last scores."""
    state = snapshot.load(config.output / "snapshots")
    records = read_metrics(config.output / "metrics.jsonl")
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    waiting = [record["waiting"] for record in records if "waiting" in record]
    held_out = [record["held_out/mlm_loss"] for record in records if "held_out/mlm_loss" in record]
    return {
        "steps": state["step"], "seconds": state["milliseconds"] / 1e3, "tokens": state["tokens"],
        "run_tokens_per_s": state["tokens"] / state["milliseconds"] * 1e3,
        "between_lines_tokens_per_s": statistics.median(rates), "waiting": statistics.median(waiting),
        "held_out_mlm_loss": held_out[-1],
    }  # fmt: skip


def of_step(config: PretrainConfig, is_quick: bool) -> float:
    """Tokens a second of the run's step alone."""
    data = read_data(config, True, ALONE)
    batches = list(itertools.islice(iter(Stream(data.train[0], 0)), 2 if is_quick else BATCHES))
    model = BertForPreTraining.from_pretrained(config.output / "model").to(config.device)
    take_step = make_step(model, make_optimizer(model, config), config, Watch(config))
    for number in range(LAST):
        take_step(batches[number % len(batches)], 1e-5, number + 1)
    taken, number = [], LAST
    for _ in range(2 if is_quick else WINDOWS):
        synchronize()
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < (0 if is_quick else 1) or not tokens:
            for micro in batches:
                number += 1
                take_step(micro, 1e-5, number)
                tokens += sum(batch.filled_tokens for batch in micro)
        synchronize()
        taken.append(tokens / (time.perf_counter() - began))
    return statistics.median(taken)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=None, help="a table with a column text; the film reviews else")
    parser.add_argument("--preset", default="base", help="width, heads and feed-forward size of this one's")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=4, help="processes that prepare batches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny model, eight steps, no CSV: does it run?")
    options = parser.parse_args()
    options.corpus = options.corpus or reviews()
    if options.quick:
        options.preset, options.layers, options.batch_tokens = "tiny", 2, 512
    return options


def main() -> None:
    options = parse()
    torch.set_default_device("cpu")  # whatever is made without a device stays there, as in `fastbert pretrain`
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_start(options, folder / "start")
        pretrain(settings(options, folder))
        config = read_config(folder / "run")
        measured = of_run(config)
        bare = of_step(config, options.quick)
        share = measured["run_tokens_per_s"] / bare
        print(
            f"\nthe run trained on {measured['run_tokens_per_s']:,.0f} tokens/s in {measured['seconds']:,.0f} s, "
            f"{measured['between_lines_tokens_per_s']:,.0f} between evaluations; its bare step takes {bare:,.0f}: "
            f"the run reaches {share:.1%} of it (wanted: 95 %)"
        )
        if options.quick:
            return
        torch.set_default_device(options.device)  # which names the results
        path = results_path("run", f"{options.preset}-{options.layers}-layers")
        row = measured | {"step_tokens_per_s": bare, "share": share, "preset": options.preset}
        names = "layers", "batch_tokens", "workers"
        write_csv(path, [row | {name: getattr(options, name) for name in names}])
        shutil.copy(config.output / "loss.png", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
