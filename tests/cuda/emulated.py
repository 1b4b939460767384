"""Builds CUDA sources for the emulator of csrc/emulator and calls their launchers on tensors or arrays of the CPU.

    from emulated import Library, Output

    library = Library.build("my_kernels.cu", trace=True)
    library.run("row_sum", x=x, y=Output(y), rows=3, columns=8)  # raises KernelError, naming line, block and thread
    print(library.table())                                       # sectors and bank conflicts per source line

A launcher is an `extern "C"` function that returns launch()'s number and takes, in this order, addresses (tensors of
torch, arrays of numpy), int64_t (int), float (float) and last the stream. docs/emulator.md has the whole picture.
"""

import contextlib
import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from build_cache import built

EMULATOR = Path(__file__).resolve().parents[2] / "csrc/emulator"

FLAGS = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = {
    False: ["-O2", "-g1"],
    # Scalar replacement would split a 16-byte load into four before it is instrumented.
    True: ["-O1", "-g", "-fno-tree-sra", "-fsanitize=thread,bounds"],
}
TRACE_SOURCES = ("instrumentation.cpp", "trace.cpp", "access_table.cpp", "happens_before.cpp")
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "shuffled1": (2, 1), "shuffled2": (2, 2)}


class KernelError(RuntimeError):
    """What the emulator found: a line per finding, each beginning with its kind."""


# ---- build ----


@cache
def cuda_headers() -> Path | None:
    """The folder of cuda_runtime.h: of $CUDA_HOME, of the toolkit that nvcc belongs to, or of NVIDIA's wheels."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    roots += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"))
    return next(
        (Path(root) / "include" for root in roots if root and (Path(root) / "include/cuda_fp16.h").exists()), None
    )


def why_not() -> str | None:
    """Why nothing can be emulated here, or None where it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the emulator runs on Linux, x86-64 or aarch64; this is {sys.platform}, {platform.machine()}"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if cuda_headers() is None:
        return "the emulator needs CUDA's headers: set CUDA_HOME, or pip install nvidia-cuda-runtime nvidia-cuda-crt"
    return None


def compile_object(source: Path, flags: list[str]) -> Path:
    command = ["g++", *FLAGS, f"-isystem{cuda_headers()}", *flags, "-x", "c++", "-c", str(source)]
    return built(source, command, ".o")


def build(sources: list[Path], trace: bool, flags: list[str]) -> Path:
    """A shared library of kernels and emulator."""
    own = [path for path in sorted(EMULATOR.glob("*.cpp")) if trace or path.name not in TRACE_SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda source: compile_object(source, KERNEL_FLAGS[trace] + flags), sources)
        objects = [*kernels, *pool.map(lambda source: compile_object(source, ["-O2"]), own)]
    return link(sources[0], objects)


def link(source: Path, objects: list[Path]) -> Path:
    return built(source, ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects)], ".so")


def extension(name: str, bindings: Path, library: "Library", flags: list[str]) -> ModuleType:
    """The Python module `name` of C++ bindings that call a library's launchers.

    It is a library of its own: pybind11 has thread-local variables, and those of a library of kernels are its shared
    memory.
    """
    compiled = compile_object(bindings, [f"-I{sysconfig.get_path('include')}", *flags])
    link = ["g++", "-shared", str(compiled), str(library.path), f"-Wl,-rpath,{library.path.parent}"]
    path = built(bindings, link, ".so")
    unique = f"{path.stem.replace('.', '_')}.{name}"  # pybind11 takes modules of one name for the same
    loader = ExtensionFileLoader(unique, str(path))
    module = module_from_spec(spec_from_file_location(unique, path, loader=loader))
    loader.exec_module(module)
    return module


# ---- call ----


@dataclass
class Output:
    """A tensor that a kernel writes; what it holds before is nothing to read."""

    tensor: object


@dataclass
class InOut:
    """A tensor that a kernel reads and writes."""

    tensor: object


USES = {Output: 1, InOut: 2}


@dataclass
class Accesses:
    """What the instructions of one source line did to one tensor, or to shared memory."""

    kernel: str
    line: str  # "file.cu:12"; "helper.h:7 called in file.cu:12"
    access: str  # "read", "write" or "atomic"
    memory: str  # the tensor's name, "shared", or "global" where no tensor is watched
    shared: bool
    bytes: int  # of a lane
    requests: int  # of a warp
    lanes: int
    cost: int  # sectors of 32 bytes; in shared memory wavefronts
    ideal: int

    @property
    def efficiency(self) -> float:
        return self.ideal / self.cost

    @property
    def conflicts(self) -> float:
        """How many times as long as without bank conflicts."""
        return self.cost / self.ideal


def address_and_bytes(tensor) -> tuple[int, int]:
    """Of a tensor of torch or an array of numpy; of a strided view the bytes from its first to its last element."""
    if hasattr(tensor, "data_ptr"):
        if tensor.device.type != "cpu":
            raise ValueError(f"the emulator works on CPU tensors, got one on {tensor.device}")
        address, item, strides = tensor.data_ptr(), tensor.element_size(), tensor.stride()
    else:
        address, item = tensor.ctypes.data, tensor.itemsize
        strides = [stride // item for stride in tensor.strides]
    if 0 in tensor.shape:
        return address, 0
    return address, item * (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)))


class Library:
    """A library of launchers; `trace` builds watch every access, at several times the cost."""

    def __init__(self, path: Path, trace: bool):
        self.trace = trace
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_error.restype = ctypes.c_char_p
        self._library.emulator_list.restype = ctypes.c_char_p
        if trace:
            self._library.emulator_accesses.restype = ctypes.c_char_p
            self._library.emulator_watch.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]

    @classmethod
    def build(cls, *sources: Path | str, trace: bool = False, flags: list[str] | None = None) -> "Library":
        return cls(build([Path(source).resolve() for source in sources], trace, flags or []), trace)

    def run(self, launcher: str, *, order: str = "forward", sample: int = 4, seconds: float = 60, **arguments) -> None:
        """Calls a launcher, with threads and blocks in one of ORDERS. Raises KernelError with all that was found.

        Of each launch the first `sample` blocks go into the table of accesses. `seconds` of the processor's time are
        the most that a launch may take.
        """
        self.start(order, sample, seconds)
        values = [self._convert(name, argument) for name, argument in arguments.items()]
        if getattr(self._library, launcher)(*values, ctypes.c_void_p(None)) != 0:
            self.check()

    @contextlib.contextmanager
    def listing(self) -> Iterator[list[tuple[str, int]]]:
        """Within the block launchers run nothing; at its end the list gets the kernels, and blocks of each."""
        self._library.emulator_clear()
        self._library.emulator_list(1)
        launches = []
        try:
            yield launches
        finally:
            for line in self._library.emulator_list(0).decode().splitlines():
                kernel, blocks = line.split("\t")
                launches.append((kernel, int(blocks)))

    # The steps of run(), for kernels that are called some other way.

    def start(self, order: str = "forward", sample: int = 4, seconds: float = 60) -> None:
        """Forgets errors, watched tensors and the table."""
        self._library.emulator_clear()
        self._library.emulator_time_limit(ctypes.c_double(seconds))
        self._library.emulator_order(*ORDERS[order])
        if self.trace:
            self._library.emulator_forget()
            self._library.emulator_sample(sample)

    def watch(self, name: str, argument) -> int:
        """A tensor, Output or InOut from now on belongs to the memory that kernels may touch; gives its address."""
        use = USES.get(type(argument), 0)
        address, size = address_and_bytes(argument.tensor if use else argument)
        if self.trace:
            self._library.emulator_watch(address, size, use, name.encode())
        return address

    def check(self) -> None:
        """Raises KernelError where a launch since start() has failed."""
        if error := self._library.emulator_error().decode():
            raise KernelError(error)

    def _convert(self, name: str, argument):
        if isinstance(argument, bool | int):
            return ctypes.c_int64(argument)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        return ctypes.c_void_p(self.watch(name, argument))

    def accesses(self) -> list[Accesses]:
        """Of the last run, in the order of kernels and instructions."""
        rows = [row.split("\t") for row in self._library.emulator_accesses().decode().splitlines()]
        return [Accesses(*row[:4], row[4] == "1", *map(int, row[5:])) for row in rows]

    def traffic(self) -> dict[tuple[str, str], int]:
        """Bytes of global memory that the sampled blocks ask for, in whole sectors, by tensor and access.

        With all blocks sampled this is what a GPU without caches would move; the floor is each tensor's size, once.
        """
        bytes_of = {}
        for row in self.accesses():
            if not row.shared:
                key = row.memory, row.access
                bytes_of[key] = bytes_of.get(key, 0) + 32 * row.cost
        return bytes_of

    def table(self) -> str:
        """The same to read: requests, lanes, and sectors (shared memory: wavefronts) per request, had and ideal."""
        head = ["kernel", "line", "access", "memory", "bytes", "requests", "lanes", "cost", "ideal", "efficiency"]
        rows = [
            [a.kernel, a.line, a.access, a.memory, a.bytes, a.requests, f"{a.lanes / a.requests:.1f}",
             f"{a.cost / a.requests:.2f}", f"{a.ideal / a.requests:.2f}", f"{a.efficiency:.0%}"]
            for a in self.accesses()
        ]  # fmt: skip
        rows = [[str(cell) for cell in row] for row in [head, *rows]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
