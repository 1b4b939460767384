"""Run by test_launch.py in a process without the interpreter: compiles a kernel for a GPU that is not there, and notes
what its launcher is called with.
"""

import types

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastbert.kernels.launch import DIRECT, launch

calls = []


class Launcher:
    """In place of CudaLauncher."""

    def __init__(self, source, metadata):
        self.constants = source.constants

    def __call__(self, *arguments):
        calls.append(arguments)


class Driver:
    """In place of CudaDriver: what a launch asks of it."""

    launcher_cls = Launcher
    utils = types.SimpleNamespace(
        load_binary=lambda *given: (object(), "function", 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
    )
    get_current_device = staticmethod(lambda: -1)  # of the CPU's tensors
    get_current_stream = staticmethod(lambda device: "stream")
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))


@triton.jit(do_not_specialize=["rows"])
def kernel(x_ptr, other_ptr, rows, columns, factor, C: tl.constexpr, ADD: tl.constexpr):
    column = tl.arange(0, C)
    x = tl.load(x_ptr + column, mask=column < columns) * factor
    if ADD:
        x += tl.load(other_ptr + column, mask=column < columns)
    tl.store(x_ptr + column, x, mask=column < rows)


triton.runtime.driver.set_active(Driver())
torch._C._cuda_getDevice = lambda: -1
torch._C._cuda_getCurrentRawStream = lambda device: "stream"
assert DIRECT, triton.__version__

x, other = torch.empty(256), torch.empty(256)
forms = set()


def started(*arguments, **constants):
    """The arguments of one launch, which is checked in all else; notes the compiled form."""
    del calls[:]
    launch(kernel, (3, 2), *arguments, **constants)
    ((*grid, stream, function, packed, metadata, before, after), given) = calls[0][:9], calls[0][9:]
    assert (grid, stream, function) == ([3, 2, 1], "stream", "function") and len(calls) == 1
    forms.add(packed)
    assert before is None or metadata is not None or not before.calls
    assert after is None or not after.calls
    return given


def addresses(given):
    return tuple(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in given)


for arguments, constants in (
    ((x, other, 5, 48, 2.0), {"C": 64, "ADD": True}),
    ((x, None, 5, 48, 2.0), {"C": 64, "ADD": False}),
    ((x[1:], other, 5, 48, 2.0), {"C": 64, "ADD": True}),
    ((x, other, 5, 47, 2.0), {"C": 64, "ADD": True}),
    ((x, other, 5, 1, 2.0), {"C": 64, "ADD": True}),
    ((x, other, 5, 2**40, 2.0), {"C": 64, "ADD": True}),
    ((x.bfloat16(), other, 5, 48, 2.0), {"C": 64, "ADD": True, "num_warps": 2}),
):
    first = started(*arguments, **constants)
    assert addresses(first) == (*addresses(arguments), constants["C"], constants["ADD"])
    before = len(kernel.device_caches[-1][0])
    again = started(*arguments, **constants)
    assert again == addresses(first), "the second launch takes addresses, else the same"
    assert started(arguments[0], *arguments[1:2], 16, *arguments[3:], **constants)[2] == 16
    assert len(kernel.device_caches[-1][0]) == before, "nothing is compiled for another number of rows"
assert len(kernel.device_caches[-1][0]) == 7, "each of the seven is a form of its own"

del calls[:]
launch(kernel, (0, 2), x, other, 5, 48, 2.0, C=64, ADD=True)
assert not calls, "an empty grid starts nothing"

heard = []
triton.knobs.runtime.launch_enter_hook.add(heard.append)
launch(kernel, (3, 2), x, other, 5, 48, 2.0, C=64, ADD=True)
assert calls[0][7] is triton.knobs.runtime.launch_enter_hook, "a profiler hears of launches"
print("launched")
