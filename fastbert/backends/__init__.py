"""Which implementation of an op runs: `reference` (plain PyTorch), `cpu` (C++), `cuda` (NVIDIA GPUs) or `triton`
(NVIDIA's and AMD's).

The automatic choice goes by the tensor's device, on a GPU to `cuda` or, where that cannot run, to `triton`, and may
fall back to the reference, remembering why. An explicit choice, by `use_backend`, a `backend=` argument or the
environment variable FASTBERT_BACKEND, that cannot run raises with the reason.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from fastbert import allocator
from fastbert.backends import gpu, native, triton

NAMES = ("reference", "cpu", "cuda", "triton")
OPS = (
    "gelu", "layer_norm", "dropout", "embedding_norm", "cross_entropy", "attention", "hard_attention",
    "attention_distillation", "lazy_adam",
)  # fmt: skip
# Device type -> the backends that are tried in turn; AMD's GPUs are "cuda" to torch too.
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Choice:
    """What the innermost `with` block around the caller chose; a subclass for each thing that is chosen.

    It holds in the block's own context, as ContextVars do: threads and tasks beside it keep their choice. torch.compile
    does not trace `ContextVar.get`; a property that is nothing but that C function it reads, and guards on the result,
    so that a compiled function called within another block is compiled for it.
    """

    now: "Choice"  # the innermost block's; outside of blocks the instance that is asked
    _variable: ContextVar["Choice"]

    def __init_subclass__(cls):
        cls._variable = ContextVar(cls.__qualname__)
        cls.now = property(cls._variable.get)  # called with the instance, which `get` takes for its default

    def __init__(self, name: str = ""):
        self.name = name

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """The block in which `now.name` is `name`."""
        token = self._variable.set(type(self)(name))
        try:
            yield
        finally:
            self._variable.reset(token)


class _Block(Choice):
    """A `use_backend` block."""


_block = _Block()
_requested = os.environ.get("FASTBERT_BACKEND", "")  # outside of blocks, in the whole process
fallbacks: dict[tuple[str, str], str] = {}  # (op, preferred backend) -> why the reference ran instead
_on_gpu: dict[tuple[int, torch.dtype], str] = {}  # what the automatic choice has found for tensors of GPUs


def why_not(name: str) -> str | None:
    """Why the backend cannot run in this process; None where it can.

    Raises:
        ValueError: there is no such name, or FASTBERT_CPU_ISA asks for an instruction set that cannot be had.
        RuntimeError: Triton is installed and broken.
    """
    _check_name(name)
    if name == "reference":
        return None
    if name == "cpu":
        native.check_isa()
        return native.cpu_missing
    return gpu.why_not() if name == "cuda" else triton.why_not()


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"no backend is called {name!r}: expected one of {', '.join(NAMES)}")


def backends() -> list[str]:
    """Names of the backends that run in this process."""
    return [name for name in NAMES if why_not(name) is None]


def _check(name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run here: {reason}")


def check_environment() -> None:
    """Raises ValueError where FASTBERT_BACKEND or FASTBERT_CPU_ISA names what does not exist or cannot run here."""
    native.check_isa()
    if not _requested:
        return
    try:
        reason = why_not(_requested)
    except ValueError as error:
        raise ValueError(f"FASTBERT_BACKEND={_requested}: {error}") from None
    if reason is not None:
        raise ValueError(f"FASTBERT_BACKEND={_requested} was asked for and cannot run here: {reason}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block every op of this package runs on backend `name`; products of `linear` by `use_linear`.

    It holds in the block's own context (`contextvars`): other threads and asyncio tasks keep their choice, and threads
    that the block starts do not inherit it unless they run by `contextvars.copy_context().run`. The environment
    variable FASTBERT_BACKEND chooses for all threads. A backward pass runs on the backend its forward pass ran on,
    inside the block or not and whichever thread computes it. A function made by torch.compile follows the block it is
    called in; code that is compiled itself passes `backend=` to the ops instead of opening a block.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why.
    """
    _check(name)
    with _block.within(name):
        yield


def requested(name: str | None = None) -> str:
    """What an op is asked to run on: the call's own `backend=`, else the block's or the process's choice, "" if none.

    Raises:
        ValueError: the call's own names no backend.
    """
    if name is None:
        return _block.now.name or _requested
    _check_name(name)
    return name


def pick(op: str, name: str, x: Tensor) -> str:
    """The backend that runs `op` on tensors like `x`.

    Args:
        op: the op's stem, one of `OPS`.
        name: an explicit choice, or "" for the automatic one.
        x: decides by its device and dtype.

    Returns:
        Its name. "reference" is the op's own twin, which runs on every device and also takes float64.

    Raises:
        RuntimeError: an explicit choice cannot run here, or not on this device or dtype.
    """
    if not name and x.is_cpu and x.dtype in native.DTYPES and native.module is not None:
        return "cpu"  # nearly always: no time for questions
    if not name and x.is_cuda and not torch.compiler.is_compiling() and (x.get_device(), x.dtype) in _on_gpu:
        return _on_gpu[x.get_device(), x.dtype]  # nor here; what a compiler has read must not change
    if name == "reference":
        return name
    if name:
        _check(name)
        reason = _refusal(name, x)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot run {op} here: {reason}")
        return name
    reasons = {}
    for preferred in _AUTOMATIC.get(x.device.type, ()):
        reason = why_not(preferred) or _refusal(preferred, x)
        if reason is None:
            if x.is_cuda and not torch.compiler.is_compiling():
                _on_gpu[x.get_device(), x.dtype] = preferred
            return preferred
        reasons[preferred] = reason
    if any((op, preferred) not in fallbacks for preferred in reasons):
        fallbacks.update({(op, preferred): reason for preferred, reason in reasons.items()})
        if x.dtype != torch.float64 and not torch.compiler.is_compiling():
            warnings.warn(
                f"{op} runs in plain PyTorch on {x.device}, slower than a kernel would. This is said once; "
                'use_backend("reference") asks for it. '
                + "; ".join(f"{preferred}: {reason}" for preferred, reason in reasons.items()),
                stacklevel=4,
            )
    return "reference"


def _refusal(name: str, x: Tensor) -> str | None:
    """Why a backend of kernels does not take x."""
    if name == "reference":
        return None
    if name != "triton" and x.device.type != name:
        return f"it takes tensors on {'the cpu' if name == 'cpu' else 'an NVIDIA GPU'}, got one on {x.device}"
    if x.dtype not in native.DTYPES:
        return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    if name == "triton":
        return triton.refusal(x)
    return gpu.refusal(x.get_device(), x.dtype) if name == "cuda" else None


def _instruction_sets(module: ModuleType) -> str:
    names = module.instruction_sets()
    alone = (
        "; amx_bf16, so far tested by emulation alone, where FASTBERT_CPU_ISA names it" if "amx_bf16" in names else ""
    )
    return ", ".join(names) + alone


def info() -> str:
    """What `fastbert info` prints: versions, instruction set, threads, and every op by every backend."""
    from fastbert.version import __version__

    check_environment()
    module: ModuleType | None = native.module
    lines = [
        f"fastbert {__version__}, torch {torch.__version__}",
        f"threads          {torch.get_num_threads()} (torch.get_num_threads)",
        f"instruction set  {native.isa or 'none'}"
        + (" forced by FASTBERT_CPU_ISA" if native.forced_isa else "")
        + (f" (this machine runs {_instruction_sets(module)})" if module else ""),
        f"GPU              {gpu.state()}",
        f"Triton           {triton.state()}",
        f"allocator        {allocator.state()}",
        f"FASTBERT_BACKEND {os.environ.get('FASTBERT_BACKEND') or 'not set: chosen by device'}",
        "",
        f"{'op':<24}" + "".join(f"{name:<12}" for name in NAMES),
    ]
    reasons = {name: _reason(name) for name in NAMES}
    lines += [f"{op:<24}" + "".join(f"{'no' if reasons[name] else 'ok':<12}" for name in NAMES) for op in OPS]
    lines += [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    return "\n".join(lines)


def _reason(name: str) -> str | None:
    """`why_not` for those who only tell: what is broken is a reason too."""
    try:
        return why_not(name)
    except RuntimeError as error:
        return str(error)
