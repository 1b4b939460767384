"""Starts kernels, in half of the time that `kernel[grid](...)` takes for twenty arguments or less.

Triton looks up at every launch which of a kernel's compiled forms fits its arguments. Here the form is kept in a table,
and its launcher called with addresses. How that launcher is called is no promise of Triton's, so only with versions
in which it has been read; with others, and while a profiler listens to launches, Triton starts the kernel.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

# Versions whose compiled kernels are called as JITFunction.run of 3.6 to 3.9 does.
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
OPTIONS = {"enable_fp_fusion": True}  # said, since what Triton takes for it is to change
_IS_HIP = torch.version.hip is not None
_compiled: dict[tuple, tuple[Any, tuple, Any]] = {}  # the compiled form, what follows `arguments`, the kernel


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts `kernel` on the first argument's device, in torch's current stream there.

    Args:
        kernel: a function of `triton.jit`, whose `tl.constexpr` come last.
        grid: one to three sizes; where one is 0 nothing is started.
        arguments: what comes before the `tl.constexpr`: the first a tensor, then tensors, numbers and None.
        constants: each `tl.constexpr`, and options such as `num_warps`; `maxnreg` holds on NVIDIA's GPUs alone.
    """
    if 0 in grid:
        return
    if _IS_HIP:
        constants.pop("maxnreg", None)  # Triton refuses it there
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*arguments, **constants)
        return
    device = arguments[0].get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            _launch(device, kernel, grid, arguments, constants)
    else:
        _launch(device, kernel, grid, arguments, constants)


def _launch(device: int, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
    if not DIRECT or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        kernel[grid](*arguments, **constants, **OPTIONS)
        return
    key, given = _key_and_addresses(arguments)
    key = (*key, id(kernel), device, *constants.items())
    found = _compiled.get(key)
    if found is None:
        form = kernel[grid](*arguments, **constants, **OPTIONS)
        # The kernel is kept with it, so that no other gets its id.
        _compiled[key] = form, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]), kernel
        return
    form, rest, _ = found
    form.run(
        *grid, *(1,) * (3 - len(grid)), torch._C._cuda_getCurrentRawStream(device), form.function,
        form.packed_metadata, None, None, None, *given, *rest,
    )  # fmt: skip


def _key_and_addresses(arguments: tuple) -> tuple[list, list]:
    """What Triton compiles differently for, and the arguments with addresses for tensors."""
    key, given = [], []
    for x in arguments:
        if type(x) is int:
            key.append(
                1 if x == 1 else (16 if x % 16 == 0 else 0) if -(2**31) <= x < 2**31 else (x % 16 == 0, x < 2**63)
            )
            given.append(x)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            key.append(x.dtype)
            if address % 16:
                key.append("unaligned")
            if _IS_HIP and x.untyped_storage().size() >= 2**31:
                key.append("large")
            given.append(address)
        else:
            key.append(type(x))
            given.append(x)
    return key, given
