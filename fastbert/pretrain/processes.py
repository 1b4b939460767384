"""The processes of a run: one, or those that torchrun or its like started, which share the batches of each step.

Here is what they do together outside of a step; what they exchange within one is in `together`.
"""

import contextlib
import dataclasses
import datetime
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastbert.models.config import WITH_RUNNING, Norm

T = TypeVar("T")

# The others wait so long for the first one, which may tokenise a large corpus. That a process has died is noticed
# otherwise: its connections close, and torchrun ends the others.
TIMEOUT = datetime.timedelta(days=1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of the run; alone unless told otherwise."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes, prints and shows progress."""
        return self.rank == 0

    def share(self, things: int) -> range:
        """Which of so many things are this process's: neighbours, and as many as the others', or one more or less."""
        return range(things * self.rank // self.count, things * (self.rank + 1) // self.count)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, which alone calls it, in all of them; it is pickled on the way.

        An error that it raises is raised in all of them.
        """
        if self.count == 1:
            return make()
        made = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def first_then_others(self, make: Callable[[bool], T]) -> T:
        """What `make` gives, which the others call when the first one's call is done; told whether it was already."""
        if self.count == 1:
            return make(False)
        made = []
        self.first(lambda: made.append(make(False)))
        return made[0] if self.is_first else make(True)

    def gathered(self, x: T) -> list[T]:
        """What each has, in their order; it is pickled on the way."""
        if self.count == 1:
            return [x]
        all_of_them: list[Any] = [None] * self.count
        dist.all_gather_object(all_of_them, x)
        return all_of_them

    def total(self, number: int) -> int:
        """The sum of what each has."""
        return sum(self.gathered(number)) if self.count > 1 else number

    def clock(self) -> float:
        """The first one's `time.perf_counter()`, in all of them, so that they decide alike."""
        now = torch.tensor(time.perf_counter(), dtype=torch.float64, device="cpu")
        if self.count > 1:
            dist.broadcast(now, src=0)
        return now.item()

    def share_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives all of them the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def stop_asked(self, stopped: list[str]) -> Callable[[], bool]:
        """Tells after each step whether a signal has stopped any of them, in all of them after the same step.

        What they say after one step is known after the next, so that none waits for the others.

        Args:
            stopped: of this process, as `stop_signals` has it.
        """
        if self.count == 1:
            return lambda: bool(stopped)
        asked: list[tuple[torch.Tensor, dist.Work]] = []

        def stop() -> bool:
            flag = torch.tensor([len(stopped)], dtype=torch.int32, device="cpu")
            asked.append((flag, dist.all_reduce(flag, async_op=True)))
            if len(asked) == 1:
                return False
            flag, work = asked.pop(0)
            work.wait()
            return bool(flag)

        return stop


ALONE = Processes()


def backend() -> str:
    """Of torch.distributed: what exchanges tensors on the CPU, and where there are GPUs those on them."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun's environment variables name, connected within the block; one alone without them.

    A group that the caller has made already is used and left. Only the first one's output is shown. Where several fail,
    because one did or for the same cause, the first to fail raises its error, and the others SystemExit.

    Raises:
        ValueError: environment variables that do not hold. RuntimeError: the others cannot be reached.
    """
    if dist.is_initialized():
        processes = Processes(dist.get_rank(), dist.get_world_size())
        with _silent_unless_first(processes):
            yield processes
        return
    rank, count, local = (_variable(name, usual) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count == 1:
        yield ALONE
        return
    if not 0 <= rank < count:
        raise ValueError(f"RANK is a process's number among WORLD_SIZE: expected 0 to {count - 1}, got {rank}")
    store, *_ = next(rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group(
        backend(), store=dist.PrefixStore("fastbert", store), rank=rank, world_size=count, timeout=TIMEOUT
    )
    processes = Processes(rank, count)
    try:
        with _silent_unless_first(processes):
            yield processes
    except Exception as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(
                f"process {rank} of {count} (from 0) cannot reach the others any more, one of which has ended: go on "
                f"with --resume ({error})"
            ) from error
        print(f"process {rank} of {count} (from 0) was the first to fail, and the others end with it", file=sys.stderr)
        raise
    # Not after an error: who still waits for this process would be waited for.
    gc.collect()  # what is freed after the group and holds a part of it may wait for gloo's threads for ever
    dist.destroy_process_group()


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("fastbert failed", 1) == 1
    except dist.DistError:  # who keeps the store has ended
        return True


def check_devices(
    device: str, accumulate: int, processes: Processes, is_split: bool = False, norm: Norm = "layer"
) -> None:
    """Raises ValueError where `processes` cannot share the batches of a step, or the GPUs of a machine.

    Args:
        device, accumulate: the run's settings.
        is_split: the model is split over them, so that each takes as many batches as the others.
        norm: the model's.
    """
    if processes.count == 1:
        return
    if accumulate < processes.count:
        raise ValueError(
            f"each process takes at least one of the --accumulate batches of a step, and of {accumulate} "
            f"{processes.count} processes cannot: give --accumulate {processes.count} or a multiple, or start fewer"
        )
    if norm in WITH_RUNNING:
        raise ValueError(
            f"norm {norm!r} keeps running statistics, of the batches of one process, and here are {processes.count}: "
            "start one process, or train with another norm"
        )
    if is_split and accumulate % processes.count:
        raise ValueError(
            f"with --shard each process takes as many of the --accumulate batches of a step as the others: give a "
            f"multiple of {processes.count}, got {accumulate}"
        )
    where = torch.device(device)
    if where.index is not None:
        raise ValueError(
            f"each of several processes takes the GPU of its LOCAL_RANK: expected device cuda, got {device}"
        )
    here = _variable("LOCAL_WORLD_SIZE", 1)
    if where.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(
            f"each process takes a GPU of its own: expected at most {torch.cuda.device_count()} processes on a machine "
            f"(torchrun --nproc-per-node), got {here}"
        )


def expect_same_folder(folder: Path, processes: Processes) -> None:
    """Raises FileNotFoundError in all processes where one does not see the run's folder that the first one made."""
    if processes.count == 1:
        return
    seen = (folder / ".lock").exists()
    blind = [host for sees, host in processes.gathered((seen, platform.node())) if not sees]
    if blind:
        raise FileNotFoundError(
            f"{folder} is not to be seen by processes on {', '.join(sorted(set(blind)))}: give an --output on a file "
            "system that all machines share, by a path that is the same on all"
        )


def _variable(name: str, usual: int) -> int:
    value = os.environ.get(name, "") or str(usual)
    if not value.isdecimal():
        raise ValueError(f"{name} in the environment is a number that torchrun sets, got {value!r}")
    return int(value)


@contextlib.contextmanager
def _silent_unless_first(processes: Processes) -> Iterator[None]:
    if processes.is_first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
