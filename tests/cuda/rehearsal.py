"""A step on a GPU, rehearsed without one: does it wait for the device, and what does it launch?

    with rehearsal.on_a_gpu() as rehearsal:
        model = fastbert.BertForPreTraining(config).to("cuda")
        step(model, rehearsal.tensor([T], torch.int64))
    print(rehearsal.table())

Tensors are fake ones on "cuda": they have shapes and no memory, so the true sizes of a model cost nothing, and all code
takes the branches that it takes on a GPU, autograd's too. What a captured step must not do raises `Waits`: read a
number (`item`, `if tensor`), compute a shape from data (`nonzero`, `unique`, a bool index), copy between host and
device. Every launch is noted. Of torch's ops each that is not a view counts as one kernel, more where `KERNELS` knows
better; of ours the launchers of csrc/cuda say which they start for these very sizes, the emulator listing launches
instead of running them. Bytes are those of an op's tensors, each once: what it must move, not what it does.

What is not seen: whether torch's ops wait inside, LazyAdam's plans (its steps go by their arguments here), times.
"""

import contextlib
import ctypes
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import emulated_backend
import torch
from build_cache import built
from emulated_backend import BACKENDS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastbert.backends import gpu, gradient_norm, lazy_adam
from fastbert.optim import gradients
from fastbert.optim import lazy_adam as optimizers

aten = torch.ops.aten
FREE = {  # nothing runs: views that do not say so, and memory
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.detach.default, aten._unsafe_view.default, aten.lift_fresh.default,
    aten.set_.source_Tensor, aten._reshape_alias.default,
}  # fmt: skip
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.addmm_.default}
KERNELS = {  # of one op, where they are more than one: as torch 2.11 has them on CUDA
    aten.embedding_dense_backward.default: 14,  # ids are sorted by cub, and sums go by pieces
    aten.index_copy.default: 2,
    aten.index_add.default: 2,
}


class Waits(RuntimeError):
    """The step would have waited for the device, or has a shape that depends on data."""


class Launch(NamedTuple):
    op: str
    kernel: str
    bytes: int  # of the op's tensors, with its first kernel


class Rehearsal(TorchDispatchMode):
    """Notes what is launched within it, and raises `Waits`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            result = function(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{function} depends on data on the device") from error
        given, made = tensors((args, kwargs)), tensors(result)
        if self._crosses(function, given, made):
            raise Waits(f"{function} copies between host and device")
        if not any(x.is_cuda for x in (*given, *made)):
            return result
        name, size = str(function).removeprefix("aten.").removesuffix(".default"), bytes_of([*given, *made])
        if function.namespace == "fastbert":
            self.note(name.removeprefix("fastbert."), size, launches_of(function, args))
        elif function.namespace == "c10d":
            self.note(name.removeprefix("c10d."), size, [("exchange", 0)])
        elif function.namespace == "aten" and function not in FREE and not function.is_view:
            kernel = "product" if function in PRODUCTS else "torch"
            count = of_lists(args) if name.startswith("_foreach") else KERNELS.get(function, 1)
            self.note(name, size, [(kernel, 0)] * count)
        return result

    def _crosses(self, function: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """A number of the host goes along as a kernel's argument; what has elements is copied."""
        if function in (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default):
            return len({x.device.type for x in (*given, *made)}) > 1
        return False

    def note(self, op: str, size: int, kernels: list[tuple[str, int]]) -> None:
        for i, (kernel, _) in enumerate(kernels):
            self.launches.append(Launch(op, kernel, size if i == 0 else 0))

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def table(self) -> str:
        """Kernels and gigabytes of each op, most kernels first."""
        kernels, size = Counter(launch.op for launch in self.launches), Counter()
        for launch in self.launches:
            size[launch.op] += launch.bytes
        lines = [f"{op:<34}{count:>6}{size[op] / 1e9:>9.3f}" for op, count in kernels.most_common()]
        total = f"{'all':<34}{len(self.launches):>6}{sum(size.values()) / 1e9:>9.3f}"
        return "\n".join([f"{'op':<34}{'kernels':>6}{'GB':>8}", *lines, total])


def of_lists(arguments: tuple) -> int:
    """Kernels of an op of one or two lists: so many tensors, or 320 pieces of 65,536 numbers, go at a time."""
    first, second = arguments[:2]
    at_a_time = 64 if isinstance(second, list | tuple) else 110
    return max(-(-len(first) // at_a_time), -(-sum(-(-x.numel() // 65_536) for x in first) // 320))


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def bytes_of(given: list[Tensor]) -> int:
    """Of each tensor once; an expanded one has only what lies in memory."""
    own = {
        (id(x.untyped_storage()), x.storage_offset()): math.prod(
            size for size, stride in zip(x.shape, x.stride(), strict=True) if stride
        ) * x.element_size()
        for x in given
    }  # fmt: skip
    return sum(own.values())


# ---- what our ops launch --------------------------------------------------------------------------------------------


def launches_of(function: Any, arguments: tuple) -> list[tuple[str, int]]:
    """The kernels of one of our ops for tensors of these shapes, dtypes and strides."""
    described = tree_map(lambda x: Like(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x, arguments)
    return _launches_of(function._schema.name.removeprefix("fastbert::"), freeze(described))


class Like(NamedTuple):
    """A tensor with memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu")


def freeze(tree: Any) -> Any:
    if isinstance(tree, list | tuple) and not isinstance(tree, Like):
        return tuple(freeze(x) for x in tree)
    return tree


@cache
def _launches_of(name: str, described: tuple) -> list[tuple[str, int]]:
    with outside_modes():
        arguments = [x.made() if isinstance(x, Like) else list(x) if isinstance(x, tuple) else x for x in described]
    files = (getattr(emulated_backend.ops, stem).kernels for stem in (*emulated_backend.OPS, "embedding"))
    kernels = next(file for file in files if hasattr(file, name))
    return listed(lambda: getattr(kernels, name)(*arguments))


def listed(call: Any) -> list[tuple[str, int]]:
    """What a call of fastbert/backends on tensors of the CPU would launch."""
    emulated = emulated_backend.module(trace=False)
    with (
        outside_modes(),
        mock.patch.object(gpu, "module", emulated.compiled),
        mock.patch.object(emulated_backend.native, "module", emulated.compiled),
        emulated.library.listing() as launches,
    ):
        call()
    return launches


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


# ---- a GPU that is not there ----------------------------------------------------------------------------------------


@cache
def stand_in() -> None:
    """Lets fake tensors be on "cuda"; once, for the rest of the process, and before autograd has run in it."""
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).with_name("stand_in.cpp")
    command = [
        "g++", "-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(source),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    ctypes.CDLL(str(built(source, command, ".so"))).stand_in()


class StepsByArguments:
    """LazyAdam's and the norm's way to the kernels, noted."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal

    def lazy_adam_steps(self, steps) -> None:
        copies = [s._replace(**{k: real(x) for k, x in s._asdict().items() if isinstance(x, Tensor)}) for s in steps]
        size = sum(bytes_of([x for x in (*s.changed, *s.changed, s.grad) if x is not None]) for s in steps)
        self._rehearsal.note("lazy_adam_steps", size, listed(lambda: lazy_adam.lazy_adam_steps(copies)))

    def gradient_norm(self, given, max_norm: float) -> Tensor:
        copies = [(real(grad), None if named is None else real(named)) for grad, named in given]
        size = bytes_of([grad for grad, _ in given])
        self._rehearsal.note("gradient_norm", size, listed(lambda: gradient_norm.gradient_norm(copies, max_norm)))
        return given[0][0].new_empty(2, dtype=torch.float32)


def real(x: Tensor) -> Tensor:
    with outside_modes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


@contextlib.contextmanager
def on_a_gpu() -> Iterator[Rehearsal]:
    """Within the block "cuda" is a GPU that runs our kernels; its tensors are fake, its stream is being captured."""
    stand_in()
    emulated_backend.module(trace=False)
    rehearsal = Rehearsal()
    noted = StepsByArguments(rehearsal)
    refusal = BACKENDS._refusal
    with (
        mock.patch.object(gpu, "why_not", lambda: None),
        mock.patch.object(
            BACKENDS, "_refusal", lambda name, x: None if name == "cuda" and x.is_cuda else refusal(name, x)
        ),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        mock.patch.object(gradients, "gradient_norm", noted.gradient_norm),
        mock.patch.dict(emulated_backend.ops.lazy_adam.functions, cuda=noted),
        mock.patch.object(optimizers, "can_plan", False),
        mock.patch.object(optimizers, "check_param", lambda *_: None),  # which takes no fake tensors
        FakeTensorMode(allow_non_fake_inputs=True),
        rehearsal,
    ):
        yield rehearsal
