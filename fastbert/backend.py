"""Which implementation of an op runs: `reference` (plain PyTorch), `cpu` (C++), later `cuda` and `triton`.

The automatic choice goes by the tensor's device and may fall back to the reference, remembering why. An explicit
choice, by `use_backend`, a `backend=` argument or the environment variable FASTBERT_BACKEND, that cannot run raises
with the reason.
"""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastbert import allocator, native

NAMES = ("reference", "cpu", "cuda", "triton")
OPS = ("gelu", "layer_norm", "cross_entropy", "attention", "lazy_adam")
_AUTOMATIC = {"cpu": "cpu", "cuda": "cuda"}  # device type -> preferred backend

_requested = os.environ.get("FASTBERT_BACKEND", "")
fallbacks: dict[tuple[str, str], str] = {}  # (op, preferred backend) -> why the reference ran instead


def why_not(name: str) -> str | None:
    """Why the backend cannot run in this process; None where it can. ValueError for a name that does not exist."""
    if name not in NAMES:
        raise ValueError(f"no backend is called {name!r}: expected one of {', '.join(NAMES)}")
    if name == "reference":
        return None
    if name == "cpu":
        return native.cpu_missing
    return f"version {_version()} has no {name} kernels yet"


def _version() -> str:
    from fastbert.version import __version__

    return __version__


def backends() -> list[str]:
    """Names of the backends that run in this process, best last."""
    return [name for name in NAMES if why_not(name) is None]


def _check(name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run here: {reason}")


def check() -> None:
    """Raises ValueError where FASTBERT_BACKEND names a backend that does not exist or cannot run here."""
    reason = why_not(_requested) if _requested else None
    if reason is not None:
        raise ValueError(f"FASTBERT_BACKEND={_requested} was asked for and cannot run here: {reason}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block every op of this package runs on backend `name`, in all threads of the process.

    A backward pass runs on the backend its forward pass ran on, inside the block or not.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why.
    """
    global _requested
    _check(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def requested(name: str | None = None) -> str:
    """What an op is asked to run on: the call's own `backend=`, else the block's or process's choice, "" if none."""
    return _requested if name is None else name


def pick(op: str, name: str, x: Tensor, reference: type) -> Any:
    """The namespace whose functions run `op` on tensors like `x`.

    Args:
        op: the op's stem, one of `OPS`.
        name: an explicit choice, or "" for the automatic one.
        x: decides by its device and dtype.
        reference: the op's own twin, which runs on every device and also takes float64.

    Raises:
        RuntimeError: an explicit choice cannot run here, or not on this device or dtype.
    """
    if not name and x.is_cpu and x.dtype in native.DTYPES and native.module is not None:
        return native.cpu  # nearly always: no time for questions
    if name == "reference":
        return reference
    if name:
        _check(name)
    preferred = name or _AUTOMATIC.get(x.device.type, "reference")
    reason = why_not(preferred) or _refusal(preferred, x)
    if reason is None and preferred == "cpu":
        return native.cpu
    if name:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run {op} here: {reason}")
    fallbacks[op, preferred] = reason or f"{preferred} does not handle {x.device}"
    return reference


def _refusal(name: str, x: Tensor) -> str | None:
    if name == "cpu" and x.device.type != "cpu":
        return f"it takes tensors on the cpu, got one on {x.device}"
    if name == "cpu" and x.dtype not in native.DTYPES:
        return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    return None


def info() -> str:
    """What `fastbert info` prints: versions, instruction set, threads, and every op by every backend."""
    from fastbert.version import __version__

    check()
    module: ModuleType | None = native.module
    lines = [
        f"fastbert {__version__}, torch {torch.__version__}",
        f"threads          {torch.get_num_threads()} (torch.get_num_threads)",
        f"instruction set  {native.isa or 'none'}"
        + (" forced by FASTBERT_CPU_ISA" if native.forced_isa else "")
        + (f" (this machine runs {', '.join(module.instruction_sets())})" if module else ""),
        f"allocator        {allocator.state()}",
        f"FASTBERT_BACKEND {os.environ.get('FASTBERT_BACKEND') or 'not set: chosen by device'}",
        "",
        f"{'op':<16}" + "".join(f"{name:<12}" for name in NAMES),
    ]
    for op in OPS:
        lines.append(f"{op:<16}" + "".join(f"{'ok' if why_not(name) is None else 'no':<12}" for name in NAMES))
    lines += [f"{name}: {why_not(name)}" for name in NAMES if why_not(name) is not None]
    return "\n".join(lines)
