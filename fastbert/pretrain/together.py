"""One step of several processes: which of its batches are this one's, and what they exchange before the optimizer.

A run's step is that of all of its micro-batches, whoever computes them: losses are means over the labels of all,
gradients sums, and dropout draws the same numbers. So any number of processes takes the steps of one, to rounding.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.models.pretraining import PreTrainingModel
from fastbert.optim.accumulate import AddedGradients
from fastbert.optim.exchange import SummedGradients, all_gather_ids, sum_rows
from fastbert.pretrain.processes import ALONE, Processes

if TYPE_CHECKING:  # which takes a second to import
    from torch.distributed.fsdp import FSDPModule


class Together:
    """What this process does of a step, beside the others.

    Args:
        processes: all of them.
        accumulate: micro-batches of a step, of all processes.
        params: those whose gradients `backward` adds up: of all processes; on a GPU those of several micro-batches all
            at once.
        split: a model whose gradients FSDP2 adds up, in place of them.

    Attributes:
        own: the places in the step of this process's micro-batches.
    """

    def __init__(
        self, processes: Processes, accumulate: int, params: Iterable[Tensor] = (), split: "FSDPModule | None" = None
    ) -> None:
        self.processes, self.accumulate = processes, accumulate
        self.own = processes.share(accumulate)
        self._split = split
        params = list(params)
        # On a CPU autograd's own way, a parameter at a time, takes no more time and less memory.
        is_added = accumulate > 1 and any(param.is_cuda for param in params)
        self._added = AddedGradients(params) if is_added else None
        self._gradients = SummedGradients(params, added=self._added) if processes.count > 1 and params else None

    def sums(self, numbers: list[Tensor]) -> list[Tensor]:
        """Of each number, or of tensors of one shape, the sum of what all processes have."""
        if self.processes.count == 1:
            return numbers
        together = torch.stack(numbers)
        dist.all_reduce(together)
        return list(together.unbind())

    def skip_before(self, model: PreTrainingModel, device: torch.device | str) -> None:
        """Draws dropout's random numbers of the micro-batches before the own ones, which others compute."""
        model.skip_seeds(self.own.start, device)

    def skip_behind(self, model: PreTrainingModel, device: torch.device | str) -> None:
        """Those of the micro-batches behind the own ones."""
        model.skip_seeds(self.accumulate - self.own.stop, device)

    @contextlib.contextmanager
    def backward(self, is_last: bool) -> Iterator[None]:
        """Around the backward pass of each micro-batch; behind the last one gradients are those of all processes."""
        if self._split is not None:
            self._split.set_requires_gradient_sync(is_last)
        exchanged = is_last and self._gradients is not None
        with self._gradients.exchange() if exchanged else contextlib.nullcontext():
            yield
        if self._added is not None and not exchanged:
            self._added.take()
            if is_last:
                self._added.give_back()

    def ids(self, ids: Tensor, fixed_size: bool) -> Tensor:
        """The ids of all processes, int64 [n]; with a fixed size as many of each, which each pads with one of its own.

        Args:
            ids: int64 [own], at least one; with a fixed size as many for each micro-batch.
        """
        if self.processes.count == 1:
            return ids
        if fixed_size:
            most = -(-self.accumulate // self.processes.count)  # micro-batches of one process
            ids = torch.cat([ids, ids[:1].expand(len(ids) // len(self.own) * (most - len(self.own)))])
        return all_gather_ids(ids, same_size=fixed_size)

    def sum_rows(self, param: Tensor, ids: Tensor, fixed_size: bool) -> None:
        """Adds up the gradient's rows `ids`, which are those of all processes, over all of them."""
        if self.processes.count > 1 and self._split is None:
            sum_rows(param, ids, fixed_size=fixed_size)


SOLO = Together(ALONE, 1)
