"""The batches of a run, epoch after epoch, of which each process takes its share of every step."""

import functools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from fastbert.data.batch import Batch
from fastbert.data.batches import PretrainBatches
from fastbert.signals import obey_the_parent_alone


class Stream:
    """The batches of step after step, and where the run stands: the next step begins with batch `index` of `epoch`.

    A step takes the next `accumulate` batches, whoever computes them, so that the order is the same for any number of
    processes; iterating gives those at the places `own` among them. Only these are prepared here.
    """

    def __init__(self, batches: PretrainBatches, workers: int, accumulate: int = 1, own: range | None = None):
        self.batches, self.workers, self.accumulate = batches, workers, accumulate
        self.own = range(accumulate) if own is None else own
        self.epoch = self.index = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        micro: list[Batch] = []
        before = 0  # batches that the step has of the epoch before
        while True:
            batches = self.batches.at_epoch(self.epoch)
            first = self.index
            place_of = functools.partial(_place, first - before, self.accumulate)  # in its step, of each batch
            # A generator of its own: the loader draws from it, and torch's default one is part of what resumes.
            loader = DataLoader(
                batches, batch_size=None, sampler=(i for i in batches.numbers(first) if place_of(i) in self.own),
                num_workers=self.workers, generator=torch.Generator(), worker_init_fn=obey_the_parent_alone,
            )  # fmt: skip
            own = iter(loader)
            for i in batches.numbers(first):
                if place_of(i) in self.own:
                    micro.append(next(own))
                self.index += 1
                if place_of(i) == self.accumulate - 1:
                    yield micro
                    micro = []
            before = (before + self.index - first) % self.accumulate
            self.epoch, self.index = self.epoch + 1, 0

    def followed_by(self, batches: PretrainBatches) -> "Stream":
        """Other batches from here on, from the next epoch's first, so that no random number is drawn twice."""
        stream = Stream(batches, self.workers, self.accumulate, self.own)
        stream.epoch = self.epoch + 1
        return stream


def _place(start: int, accumulate: int, i: int) -> int:
    return (i - start) % accumulate
