"""What preparing batches costs beside a step of BERT mini, one worker or none.

    python benchmarks/data_path.py [--megabytes 1000 | --store STORE]

The share is the time that the training process waits for a batch, of the time of a step and that waiting together:
batches by the data loader with so many workers, then forward, backward and LazyAdam. A store of several shards and
next-sentence prediction, the dearest of the objectives to prepare. Without --store a store of the film reviews is made,
in a temporary folder; with --megabytes of the reviews repeated up to that size, of which 1,000 are some ten million
sentences.

Pauses are the seconds from nothing to a run's first batch (the store is opened and the bounds of its sentences are
read), and from the end of an epoch to the next one's first batch, both by a loader that is made for it, as in training.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from prepare import write_corpus
from reviews import reviews
from timing import results_path, write_csv
from torch.utils.data import DataLoader

from fastbert import BertConfig, BertForPreTraining, LazyAdam
from fastbert.data import (
    PretrainBatches,
    Reading,
    iter_documents,
    open_stores,
    prepare_store,
    special_ids,
    train_tokenizer,
)
from fastbert.data.shards import read_tokenizer
from fastbert.pretrain.evaluate import forward


def pauses(store: Path, workers: int, batch_tokens: int) -> tuple[PretrainBatches, float, float]:
    """The batches of a store; seconds to the first one, and to the next epoch's first one."""
    start = time.perf_counter()
    train, _ = open_stores(store)
    special = special_ids(read_tokenizer(store))
    batches = PretrainBatches(train, special, seq_len=128, batch_tokens=batch_tokens, seed=0)
    taken = []
    for epoch in range(2):
        again = batches.at_epoch(epoch)
        loader = iter(DataLoader(again, batch_size=None, sampler=again.numbers(), num_workers=workers))
        next(loader)
        taken.append(time.perf_counter() - start)
        del loader  # its worker ends here, which is not the pause
        start = time.perf_counter()
    return batches, *taken


def measure(batches: PretrainBatches, workers: int, steps: int) -> tuple[float, float]:
    """Medians of a step's seconds and of those that it waited for its batch."""
    torch.manual_seed(0)
    config = BertConfig.preset("mini", vocab_size=batches.store.vocab_size)
    model = BertForPreTraining(config).train()
    optimizer = LazyAdam(model.parameters(), lr=1e-4)
    loader = DataLoader(batches, batch_size=None, sampler=batches.numbers(), num_workers=workers)
    waited, taken = [], []
    batch, source = None, iter(loader)
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(source)
        there = time.perf_counter()
        forward(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        waited.append(there - start)
        taken.append(end - there)
    return statistics.median(taken[2:]), statistics.median(waited[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--store", type=Path)
    source.add_argument("--megabytes", type=int, help="of text, the reviews repeated")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--csv", action="store_true", help="write benchmarks/results/data_path-....csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or Path(folder) / "store"
        if args.store is None:
            texts = (sentence for document in iter_documents(reviews(), "text") for sentence in document)
            tokenizer, corpus = train_tokenizer(texts, 8192), reviews()
            if args.megabytes:
                corpus = Path(folder) / "corpus.jsonl"
                write_corpus(corpus, 1_000_000 * args.megabytes)
            prepare_store(store, corpus, Reading("text"), tokenizer, processes=os.cpu_count() or 1)
        rows = []
        for workers in (0, 1):
            batches, first, following = pauses(store, workers, args.batch_tokens)
            step, wait = measure(batches, workers, args.steps)
            rows.append({
                "workers": workers, "sentences": len(batches.store.sentences) - 1,
                "shards": len(list(batches.store.shards())),
                "batch_tokens": args.batch_tokens, "first_batch_s": round(first, 3),
                "next_epoch_s": round(following, 3), "step_ms": round(1e3 * step, 2),
                "waited_ms": round(1e3 * wait, 3), "share": round(wait / (step + wait), 4),
            })  # fmt: skip
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    if args.csv:
        write_csv(results_path("data_path"), rows)


if __name__ == "__main__":
    main()
