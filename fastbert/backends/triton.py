"""The kernels of `fastbert.kernels`, written in Triton: whether they run in this process, and on which tensors.

They are for GPUs that `_cuda` is not built for: without nvcc, or AMD's. With TRITON_INTERPRET=1, set before fastbert is
imported, Triton interprets them in Python, on tensors of the CPU too: thousands of times slower, for tests.
"""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 6)
# Triton's own reading of the variable, here before Triton is imported.
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_INSTALL = (
    "pip install triton"
    if torch.version.hip is None
    else "torch's wheels for ROCm bring their own, so install torch anew (pytorch.org/get-started)"
)


def why_not() -> str | None:
    """Why the kernels cannot run in this process; None where they can.

    Raises:
        RuntimeError: Triton is installed and cannot be imported. That is an error rather than a reason to fall back.
    """
    if not interpreted and not torch.cuda.is_available():
        return (
            "torch sees no GPU (torch.cuda.is_available()). TRITON_INTERPRET=1, set before fastbert is imported, runs "
            "the kernels on the CPU, far slower than any other backend: for tests"
        )
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Why Triton itself does not serve."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # nothing, or a folder without a package
        return f"Triton is not installed: {_INSTALL}"
    try:
        import triton
        import triton.language
    except Exception as error:
        raise RuntimeError(
            f"Triton is installed and cannot be imported ({type(error).__name__}: {error}): install it anew, by "
            "pip install --force-reinstall triton, or uninstall it"
        ) from error
    version = _version(triton.__version__)
    if version < OLDEST:
        return f"the kernels need Triton {_dotted(OLDEST)} or later, and {triton.__version__} is installed: {_INSTALL}"
    return _not_interpreted(version) if interpreted else None


def _not_interpreted(version: tuple[int, ...]) -> str | None:
    """Why this version of Triton cannot interpret kernels here."""
    try:
        numpy = _version(importlib.metadata.version("numpy"))
    except importlib.metadata.PackageNotFoundError:
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter needs numpy: pip install numpy"
    if version < (3, 7) and numpy >= (2, 4):
        return (
            f"TRITON_INTERPRET=1 is set, and the interpreter of Triton {_dotted(version)} fails with numpy "
            f"{_dotted(numpy)}: pip install 'numpy<2.4', or Triton 3.7 or later"
        )
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def refusal(x: Tensor) -> str | None:
    """Why x, of a dtype that kernels take, cannot be taken; None where it is."""
    if interpreted:
        return None
    if not x.is_cuda:
        return f"it takes tensors on a GPU, got one on {x.device}; on the CPU only with TRITON_INTERPRET=1, for tests"
    return _refusal_on(x.get_device(), x.dtype)


@functools.cache
def _refusal_on(device: int, dtype: torch.dtype) -> str | None:
    if torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    own = 10 * properties.major + properties.minor
    its = f"{properties.name} is sm_{own}"
    if own < 75:
        return f"{its}, and the kernels run from sm_75 on"
    if dtype == torch.bfloat16 and own < 80:
        return f"bfloat16 needs sm_80 or later, and {its}: take float16 or float32"
    return None


# A compiler takes the answers as they are instead of reading how they are found.
why_not._dynamo_marked_constant = refusal._dynamo_marked_constant = True


def state() -> str:
    """What `fastbert info` says of Triton."""
    try:
        reason = why_not()
    except RuntimeError as error:
        return str(error)
    if reason is not None:
        return "not used: see triton below"
    import triton

    if interpreted:
        return f"{triton.__version__}, interpreted on the CPU: TRITON_INTERPRET is set"
    devices = range(torch.cuda.device_count())
    names = [f"{torch.cuda.get_device_name(i)}: {_refusal_on(i, torch.bfloat16) or 'ok'}" for i in devices]
    return f"{triton.__version__} ({'; '.join(names)})"


def function(stem: str, name: str) -> Callable:
    """`fastbert.kernels.<stem>.<name>`, of which Triton is imported at the first call."""

    @functools.cache
    def found() -> Callable:
        return getattr(importlib.import_module(f"fastbert.kernels.{stem}"), name)

    def call(*arguments: Any) -> Any:
        return found()(*arguments)

    return call


def check_faults() -> None:
    """Raises what kernels have found wrong in the ids of earlier calls."""
    faults = sys.modules.get("fastbert.kernels.faults")  # no kernel has run that could have, before it is imported
    if faults is not None:
        faults.check()
