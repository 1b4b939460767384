"""The backend "cuda" without a GPU: csrc/cuda/*.cu and bindings_cuda.cpp, emulated, on tensors of the CPU.

    with emulated_backend.installed(emulated_backend.module(trace=True)):
        fastbert.gelu(x, backend="cuda")

Ops run through their public functions and the files of fastbert/backends, as on a GPU. Each call of the module knows
its tensors by the names that csrc/contract.h gives them: whatever address it is given, some tensor was asked for it.

A value build runs a small call in every order of threads and blocks, and results must be the same bits. A trace build
watches every access: `const` in the contract is an input, what a step changes in place is read and written, and all
else is an output, which holds nothing at first.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import emulated
import pytest
import torch
from build_cache import ROOT
from emulated import ORDERS, InOut, Library, Output, extension
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastbert
from fastbert import ops
from fastbert.backends import OPS, gpu, gradient_norm, native
from fastbert.backends import lazy_adam as lazy_adam_kernels
from fastbert.optim import gradients, plan

BACKENDS = import_module("fastbert.backends")  # `fastbert.backends` is the function of that name
ARCHS = "75,80,90"
IN_PLACE = {"param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "row_steps", "last_step", "bf16_copy", "dtable"}
EVERY_ORDER = 1 << 15  # numbers that a call may have to be run in all orders


class Field(NamedTuple):
    name: str
    is_pointer: bool
    use: type | None  # Output, InOut, or None for an input


@cache
def contract() -> dict[str, list[Field]]:
    """By the name of its function, "gelu_forward", the fields of each struct in csrc/contract.h."""
    text = re.sub(r"//.*", "", (ROOT / "csrc/contract.h").read_text())
    structs = {}
    for name, base, body in re.findall(r"struct (\w+)(?: : (\w+))? \{(.*?)\n\};", text, re.DOTALL):
        structs[name] = [*structs.get(base, ()), *(field for line in body.split(";") for field in fields(line))]
    return {re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower(): found for name, found in structs.items()}


def fields(declaration: str) -> Iterator[Field]:
    """Those of "const float *mean, *rstd"."""
    for name in re.findall(r"(\w+)(?=,|$)", " ".join(declaration.split())):
        is_input = declaration.split()[0] == "const"
        use = None if is_input else InOut if name in IN_PLACE else Output
        yield Field(name, "*" in declaration, use)


class AskedAddresses(TorchFunctionMode):
    """Within its block, `tensors` gets every tensor that is asked for its address, by that."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is Tensor.data_ptr:
            self.tensors[result] = args[0]
        return result


class Module:
    """`fastbert._cuda`, emulated; `sample` blocks of a traced launch go into the table of `library.accesses()`."""

    def __init__(self, trace: bool) -> None:
        import pybind11  # here, as a GPU's own tests read this file and can do without

        self.library = Library.build(*sorted((ROOT / "csrc/cuda").glob("*.cu")), trace=trace)
        flags = [f"-I{pybind11.get_include()}", f"-DFASTBERT_CUDA_ARCHS={ARCHS}"]
        self.compiled = extension("_cuda", ROOT / "csrc/bindings_cuda.cpp", self.library, flags)
        self.fault_words = torch.zeros(self.compiled.faults, dtype=torch.int32)
        self.compiled.report_faults_to(self.fault_words.data_ptr())
        self.sample = 4
        self.most: int | None = None  # numbers that a call may have
        self._asked: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self.compiled, name):
            pytest.skip(f"csrc/cuda has no {name} yet")
        function = getattr(self.compiled, name)
        if name == "lazy_adam_steps":
            return lambda steps, launch: self._call(
                lambda: function(steps, launch),
                {f"{key}[{i}]": it for i, step in enumerate(steps) for key, it in self._tensors(name[:-1], step)},
            )
        if name == "gradient_norm":
            return lambda *given: self._call(lambda: function(*given), dict(self._tensors_of_norm(*given)))
        if name in contract():
            return lambda *numbers: self._call(lambda: function(*numbers), dict(self._tensors(name, numbers)))
        return function

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within the block fastbert/backends calls this module for tensors of the CPU."""
        with (
            AskedAddresses() as asked,
            mock.patch.object(native, "module", self),
            mock.patch.object(self, "_asked", asked.tensors),
        ):
            yield

    def _tensors(self, name: str, numbers: tuple) -> Iterator[tuple[str, tuple[Tensor, type | None]]]:
        """Those of one struct, and how they are used."""
        for field, number in zip(contract()[name], numbers, strict=True):
            if field.is_pointer and number:
                assert number in self._asked, f"{name}: no tensor was asked for the address of {field.name}"
                yield field.name, (self._asked[number], field.use)

    def _tensors_of_norm(self, gradients: list[tuple], max_norm: float, scratch: int, norm: int, launch: int):
        for i, (grad, named, *_) in enumerate(gradients):
            for key, number in ((f"grad[{i}]", grad), (f"named[{i}]", named)):
                if number:
                    yield key, (self._asked[number], None)
        yield from (("scratch", (self._asked[scratch], Output)), ("norm", (self._asked[norm], Output)))

    def _call(self, run: Callable[[], Any], tensors: dict[str, tuple[Tensor, type | None]]) -> Any:
        size = sum(x.numel() for x, _ in tensors.values())
        if self.most is not None and size > self.most:
            pytest.skip(f"a call of {size} numbers is left to a real GPU")
        if self.library.trace:
            return self._run(run, tensors, "forward")
        orders = [*ORDERS] if size <= EVERY_ORDER else ["shuffled1"]
        changed = {name: x for name, (x, use) in tensors.items() if use is not None} | {"faults": self.fault_words}
        before = {name: x.clone() for name, x in changed.items()}
        results = self._run(run, tensors, orders[0])
        first = {name: x.clone() for name, x in changed.items() if not name.startswith(("scratch", "faults"))}
        for order in orders[1:]:
            for name, x in changed.items():
                x.copy_(before[name])
            assert self._run(run, tensors, order) == results
            for name, x in first.items():
                assert torch.equal(bits(x), bits(changed[name])), f"{name} depends on the order of threads: {order}"
        return results

    def _run(self, run: Callable[[], Any], tensors: dict[str, tuple[Tensor, type | None]], order: str) -> Any:
        self.library.start(order, self.sample)
        self.library.watch("faults", InOut(self.fault_words))
        for name, (x, use) in tensors.items():
            self.library.watch(name, use(x) if use else x)
        try:
            return run()
        except RuntimeError:
            self.library.check()  # the whole of what was found
            raise


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def module(trace: bool) -> Module:
    """Built once, and with it the place for its faults."""
    return _module(trace)


@cache
def _module(trace: bool) -> Module:
    return Module(trace)


class Functions:
    """Those of a file of fastbert/backends, by an emulated module."""

    def __init__(self, kernels: ModuleType, emulated: Module) -> None:
        self._kernels, self._emulated = kernels, emulated

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments: Any) -> Any:
            with self._emulated.running():
                return getattr(self._kernels, name)(*arguments)

        return call


class EmulatedPlan(lazy_adam_kernels.Plan):
    """Steps by a plan run once, and no access is watched: the module alone knows their addresses."""

    def __init__(self, emulated: Module, *given: Any) -> None:
        self._emulated = emulated
        with emulated.running():
            super().__init__(*given)

    def step(self, *given: Any) -> bool:
        if self._emulated.library.trace:
            pytest.skip("steps by a plan are for the values build")
        self._emulated.library.start()
        with self._emulated.running():
            return super().step(*given)


@contextlib.contextmanager
def taking_cpu_tensors(backend: str = "cuda") -> Iterator[None]:
    """Within the block the backend takes tensors of the CPU."""
    refusal = BACKENDS._refusal

    def without_cpu(name: str, x: Tensor) -> str | None:
        return None if name == backend and x.is_cpu and x.dtype in native.DTYPES else refusal(name, x)

    with mock.patch.object(BACKENDS, "_refusal", without_cpu):
        yield


@contextlib.contextmanager
def functions_of(make: Callable[[ModuleType], Any], backend: str = "cuda") -> Iterator[None]:
    """Within the block the backend has of each op what `make` makes of its file of fastbert/backends."""
    with contextlib.ExitStack() as stack:
        for stem in (*OPS, "embedding", "lazy_adam_replay"):
            op = getattr(ops, stem)
            stack.enter_context(mock.patch.dict(op.functions, {backend: make(op.kernels)}))
        yield


@contextlib.contextmanager
def installed(emulated: Module, most: int | None = None) -> Iterator[Module]:
    """Within the block the backend "cuda" runs, takes tensors of the CPU, and is `emulated`.

    A call of more than `most` numbers skips its test.
    """
    with (
        mock.patch.object(gpu, "why_not", lambda: None),
        mock.patch.object(gpu, "module", emulated),
        mock.patch.object(emulated, "most", most),
        taking_cpu_tensors(),
        functions_of(lambda kernels: Functions(kernels, emulated)),
        # what LazyAdam calls beside the op
        mock.patch.object(gradients, "gradient_norm", Functions(gradient_norm, emulated).gradient_norm),
        mock.patch.object(plan, "readable", Functions(lazy_adam_kernels, emulated).readable),
        mock.patch.object(plan, "Plan", lambda *given: EmulatedPlan(emulated, *given)),
    ):
        yield emulated


@contextlib.contextmanager
def chosen(trace: bool, sample: int = 4, make: Callable[[bool], Module] = module) -> Iterator[Module]:
    """Within the block ops run on an emulated module; of a traced launch `sample` blocks are counted.

    Skips the test where nothing can be emulated.
    """
    if reason := emulated.why_not():
        pytest.skip(reason)
    chosen = make(trace)
    before, chosen.sample = chosen.sample, sample
    try:
        with installed(chosen), fastbert.use_backend("cuda"):
            yield chosen
    finally:
        chosen.sample = before
