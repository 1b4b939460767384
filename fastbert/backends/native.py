"""The C++ modules: whether `_cpu` is there, its instruction set, and what calls into both have in common; gpu.py has
what concerns `_cuda` alone.

`_cpu` and `_cuda` take addresses and sizes. The files beside this one, one a stem, make them from tensors: outputs and
scratch are allocated there and nowhere else. They take tensors as the ops hand them over, checked.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastbert.backends import gpu

try:
    import fastbert._cpu as module

    cpu_missing: str | None = None
except ImportError as error:
    module = None
    cpu_missing = (
        f"the C++ module is not there ({error}): it was left out with FASTBERT_BUILD=0 or built for another Python; "
        "reinstall fastbert-kernels with a C++ compiler present"
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/contract.h
_PARALLEL = 32768  # elements below which starting other threads costs more than it saves

forced_isa = os.environ.get("FASTBERT_CPU_ISA", "")  # read once, here


def _why_not_forced() -> str | None:
    """Uses the instruction set that FASTBERT_CPU_ISA names; why not, where it cannot be had."""
    try:
        if module is None:
            raise ValueError(cpu_missing)
        module.use(forced_isa)
    except ValueError as error:
        return (
            f"FASTBERT_CPU_ISA names the instruction set that the C++ kernels must use, and {forced_isa!r} cannot "
            f"be had: {error}. Without the variable the best of them is used"
        )
    return None


# What is wrong with FASTBERT_CPU_ISA is raised where kernels are asked for, so that a program can import the package
# and say it in its own way; until then there are none.
_isa_refused = _why_not_forced() if forced_isa else None
if _isa_refused:
    module = None
isa: str | None = None if module is None else module.selected()  # whose kernels run: that one, or the machine's best


def check_isa() -> None:
    """Raises ValueError where FASTBERT_CPU_ISA names an instruction set that cannot be had here."""
    if _isa_refused:
        raise ValueError(_isa_refused)


def launcher(x: Tensor, elements: int = _PARALLEL) -> tuple[Any, int]:
    """What has the kernels for x's device, and their launch argument.

    On the CPU that is the number of threads, one for a few `elements`; on a GPU torch's current stream there.
    """
    if x.is_cpu:
        return module, torch.get_num_threads() if elements >= _PARALLEL else 1
    return gpu.launcher(x.get_device())


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    """Of [..., columns]."""
    columns = x.shape[-1]
    return x.numel() // columns if columns else 0, columns
