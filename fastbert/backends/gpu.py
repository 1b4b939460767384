"""The module `_cuda`: whether it is there, which GPUs and dtypes it takes, and where it starts kernels."""

from typing import Any

import torch

from fastbert.backends import triton

try:
    import fastbert._cuda as module  # not from fastbert, of whose lack Python would say that imports are circular

    missing: str | None = None
except ImportError as error:
    module = None
    missing = (
        f"the module for NVIDIA GPUs is not there ({error}): nvcc was missing when fastbert-kernels was built, or "
        "FASTBERT_CUDA=0 left it out. Install a CUDA toolkit of version 12 or later, or its compiler by pip install "
        "nvidia-cuda-nvcc nvidia-cuda-cccl, and then fastbert-kernels from its sources anew"
    )

_reports = False  # whether kernels have been told where to report ids that they could not use


def why_not() -> str | None:
    """Why no GPU can be used in this process; None where one can."""
    if missing is not None:
        return missing
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one that has it (pytorch.org/get-started)"
    if not torch.cuda.is_available():
        if torch._C._cuda_getDriverVersion() == 0:
            return "there is no CUDA driver: install NVIDIA's (nvidia-smi shows it)"
        return "the CUDA driver shows no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES say which it may show)"
    driver = torch._C._cuda_getDriverVersion()
    if driver // 1000 < module.version // 1000:
        return (
            f"the CUDA driver runs programs up to CUDA {_dotted(driver)}, and the module was built by "
            f"{_dotted(module.version)}: update the driver, or build fastbert-kernels by the nvcc of CUDA "
            f"{driver // 1000}"
        )
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def refusal(device: int, dtype: torch.dtype) -> str | None:
    """Why tensors of one of `native.DTYPES` on this GPU cannot be taken; None where they are."""
    properties = torch.cuda.get_device_properties(device)
    own = 10 * properties.major + properties.minor
    its, archs = f"{properties.name} is sm_{own}", module.architectures()
    # Compiled code runs on later GPUs of its generation; the last is there in a form that all later ones compile.
    fit = [arch for arch in archs if arch <= own and (arch // 10 == own // 10 or arch == archs[-1])]
    if own < 75:
        return f"{its}, and the kernels run from sm_75 on"
    if not fit:
        return (
            f"{its}, and the module is compiled for {', '.join(f'sm_{arch}' for arch in archs)}: install "
            f"fastbert-kernels from its sources anew, with FASTBERT_CUDA_ARCHS={own}"
        )
    if dtype == torch.bfloat16 and own < 80:
        return f"bfloat16 needs sm_80 or later, and {its}: take float16 or float32"
    if dtype == torch.bfloat16 and fit[-1] < 80:
        return f"bfloat16 needs the module to be compiled for sm_80 or later, by FASTBERT_CUDA_ARCHS={own}"
    return None


# A compiler takes the answers as they are instead of reading how they are found.
why_not._dynamo_marked_constant = refusal._dynamo_marked_constant = True


def state() -> str:
    """What `fastbert info` says of GPUs."""
    if why_not() is not None:
        return "none is used by the kernels in CUDA: see cuda below"
    devices = range(torch.cuda.device_count())
    names = [f"{torch.cuda.get_device_name(i)}: {refusal(i, torch.bfloat16) or 'ok'}" for i in devices]
    archs = ", ".join(f"sm_{arch}" for arch in module.architectures())
    return f"{'; '.join(names)} (kernels for {archs}, by CUDA {_dotted(module.version)})"


def launcher(device: int) -> tuple[Any, int]:
    """The kernels, and torch's current stream of this GPU.

    Kernels start on the current device; where that is another one, the functions switch to this for the call.
    """
    if not _reports:
        _report_faults(device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    return module if device == torch._C._cuda_getDevice() else _On(device), stream


class _On:
    """The functions of `_cuda`, called with `device` as the current one."""

    def __init__(self, device: int) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(module, name)

        def call(*arguments: Any) -> Any:
            with torch.cuda.device(self._device):
                return function(*arguments)

        return call


def _report_faults(device: int) -> None:
    """Gives kernels memory of the host that every GPU can write, so that looking at it waits for none."""
    global _reports
    with torch.cuda.device(device):  # not on one that nobody uses, where it would begin to take memory
        module.report_faults()
    _reports = True


def check_device_errors(device: torch.device | str | int | None = None) -> None:
    """Waits for a GPU and raises what kernels have found wrong in labels, row ids and sequence boundaries.

    On the CPU ops look at them before they compute. On a GPU that would wait for the device, so a kernel leaves out
    what it cannot use, gives NaN for it and reports it. The next call of an op raises what has been reported by then;
    this function is for the end of a run, and before what was computed is kept.

    Args:
        device: the GPU to wait for; None waits for the current one. What others have reported is raised too.

    Raises:
        ValueError: of an earlier call; it names the op and the place of the id. It is raised once.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
    if module is not None:
        module.check_faults()
    triton.check_faults()
