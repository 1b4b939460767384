"""A model and its optimizer in a folder of `torch.distributed.checkpoint`, written and read by any number of processes.

What all processes have is written once, by one or the other of them; of what is split among them each writes its part.
The number that reads need not be the number that wrote.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Writes both into `folder`, which is new; called by all processes of the default group.

    Raises:
        OSError: one of the processes could not write, in all of them.
    """
    import torch.distributed.checkpoint as dcp

    with _own_error():
        dcp.save(_state_of(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Reads both from `folder`; called by all processes of the default group.

    Raises:
        ValueError: it holds another model. OSError: it cannot be read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = _state_of(model, optimizer)
    try:
        with _own_error():
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (RuntimeError, ValueError) as error:
        if "gloo" in str(error):  # another process has ended
            raise
        raise ValueError(f"{folder} holds another model or optimizer: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """By the parameters' names; the optimizer's is made where there is none yet, for `load` to write into."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


@contextlib.contextmanager
def _own_error() -> Iterator[None]:
    """Raises what went wrong in one process, in place of a table of all; an OSError where the system says so."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # that one process alone reads
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as all_of_them:
        errors = [error for error, _ in all_of_them.failures.values()]
        chains = [list(_chain(error)) for error in errors]
        system = [error for chain in chains for error in chain if isinstance(error, OSError)]
        raise (system or errors)[0] from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
