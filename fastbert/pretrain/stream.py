"""The batches of a run, epoch after epoch, of which each process takes its share of every step."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
        # Workers stay from one epoch to the next, and prepare its first batches before the last ones are trained on.
        of_loader, of_steps = itertools.tee(self._places())
        loader = DataLoader(
            OfEpochs(self.batches), batch_size=None,
            sampler=((batches.epoch, batches.samples(i)) for batches, i, place in of_loader if place in self.own),
            # A generator of its own: the loader draws from it, and torch's default one is part of what resumes.
            num_workers=self.workers, generator=torch.Generator(), worker_init_fn=obey_the_parent_alone,
            collate_fn=as_arrays,
        )  # fmt: skip
        own, micro = iter(loader), []
        for batches, i, place in of_steps:
            if place in self.own:
                micro.append(as_tensors(next(own)))
            self.epoch, self.index = batches.epoch, i + 1
            if place == self.accumulate - 1:
                yield micro
                micro = []

    def _places(self) -> Iterator[tuple[PretrainBatches, int, int]]:
        """Of each batch from here on: those of its epoch, its number there, and its place in its step."""
        epoch, first, place = self.epoch, self.index, 0
        while True:
            batches = self.batches.at_epoch(epoch)
            for i in batches.numbers(first):
                yield batches, i, place
                place = (place + 1) % self.accumulate
            epoch, first = epoch + 1, 0

    def followed_by(self, batches: PretrainBatches) -> "Stream":
        """Other batches from here on, from the next epoch's first, so that no random number is drawn twice."""
        stream = Stream(batches, self.workers, self.accumulate, self.own)
        stream.epoch = self.epoch + 1
        return stream


def as_arrays(batch: Batch) -> Batch:
    """As it comes from another process by one message; each tensor would be a file that this one opens and maps."""
    return Batch(*(x.numpy() if isinstance(x, Tensor) else x for x in batch))


def as_tensors(batch: Batch) -> Batch:
    return Batch(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch))


class OfEpochs(Dataset[Batch]):
    """Batches by their epoch and samples: so many processes make them, and one finds out which samples go together."""

    def __init__(self, batches: PretrainBatches) -> None:
        self._batches = batches

    def __getitem__(self, place: tuple[int, np.ndarray]) -> Batch:
        epoch, samples = place
        return self._batches.at_epoch(epoch).made_of(samples)
