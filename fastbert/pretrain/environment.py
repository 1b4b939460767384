"""What a resumed run must share with the run before it to continue bit for bit, and the generators' states."""

import platform
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.backends import native, requested
from fastbert.ops.philox import CONTRACT
from fastbert.pretrain.settings import PretrainConfig
from fastbert.version import __version__

RANDOM_NUMBERS = "random numbers"  # in what a run keeps: the contract by which they were drawn


def contract_of(kept: Any) -> int:
    """The contract of random numbers that a dict which a run keeps names; the first where it names none."""
    return kept.get(RANDOM_NUMBERS, 1) if isinstance(kept, dict) else 1


def environment(config: PretrainConfig) -> dict[str, Any]:
    """What a resumed run must share with the run before it to continue bit for bit."""
    return {
        "fastbert": __version__,
        "torch": str(torch.__version__),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "instruction set": native.isa or "none",
        "backend": requested() or "by device",
        "linear products": config.linear,
        RANDOM_NUMBERS: CONTRACT,
    }


def name_differences(then: dict[str, Any], config: PretrainConfig) -> None:
    """Says what is not as in `then`, the environment of the snapshot that the run goes on from."""
    now = environment(config)
    before = contract_of(then)
    if before != CONTRACT:
        print(
            f"the run's random numbers were drawn by contract {before}, and are by contract {CONTRACT} from here on: "
            "dropout, masking and the order of samples continue by the new one, so the continued run is not bit for "
            "bit what an uninterrupted one would have been. In this epoch some samples come twice and others not at "
            "all, and held-out scores are measured on other masks than before"
        )
    then = {"processes": 1, **then, RANDOM_NUMBERS: CONTRACT}
    different = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    if different:
        print(f"resumed elsewhere than it was stopped, so not bit for bit the unbroken run: {', '.join(different)}")


def random_state(device: str) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {})


def set_random_state(states: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.startswith("cuda"):
        torch.cuda.set_rng_state(states["cuda"], device)
