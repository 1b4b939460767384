"""Fixtures shared by the op tests."""

import contextlib
import os
from unittest import mock

import pytest
import torch

# Before anything imports Triton. Without a GPU its kernels are interpreted: see tests/triton/interpreter.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import emulated
import emulated_backend
import gpu_backend

import fastbert
from fastbert.backends import linear, native, why_not

native.check_isa()  # a name that cannot be had would leave the tests of kernels out
KERNELS = [f"cpu:{isa}" for isa in (native.module.instruction_sets() if native.module else [])]
EMULATED = ["cuda:values", "cuda:trace"]  # see tests/cuda/emulated_backend.py
GPU = ["cuda:gpu", "triton:gpu"] if torch.cuda.is_available() else []  # see tests/cuda/gpu_backend.py
# Without Triton the tests are there and skipped, so that this is said.
INTERPRETED = [] if torch.cuda.is_available() else ["triton"]  # see tests/triton/interpreter.py
# Traced, the emulated kernels take a minute to compile and more to run than all else: `make test-nested` does it.
CUDA = [*GPU, "cuda:values", pytest.param("cuda:trace", marks=pytest.mark.nested)]
# Numbers of a call, without and with a trace: all emulated op tests together take a minute of one core.
MOST_EMULATED = {False: 200_000, True: 1 << 15}
MOST_PROGRAMS = 24  # of an interpreted launch: all such op tests together take less than two minutes


@contextlib.contextmanager
def within(chosen, most_programs=MOST_PROGRAMS):
    if chosen in GPU:
        backend = chosen.partition(":")[0]
        with gpu_backend.installed("cuda", backend), fastbert.use_backend(backend):
            yield backend
        fastbert.check_device_errors()
        return
    if chosen in INTERPRETED:
        if reason := why_not("triton"):
            pytest.skip(reason)
        import interpreter

        from fastbert.kernels import lazy_adam, lazy_adam_replay

        # What a program works on is of no account to its results, and a few large ones take less time here.
        large = mock.patch.object(lazy_adam, "TILE", 2048), mock.patch.object(lazy_adam_replay, "PLAN_PLACES", 64)
        with large[0], large[1], interpreter.installed(most_programs), fastbert.use_backend("triton"):
            yield "triton"
        return
    if chosen in EMULATED:
        if reason := emulated.why_not():
            pytest.skip(reason)
        trace = chosen == "cuda:trace"
        module = emulated_backend.module(trace)
        module.fault_words.zero_()  # of a test that was to leave some
        with emulated_backend.installed(module, MOST_EMULATED[trace]), fastbert.use_backend("cuda"):
            yield "cuda"
        return
    name, _, isa = chosen.partition(":")
    before = native.isa
    if isa:
        native.module.use(isa)
    with fastbert.use_backend(name):
        yield name
    if isa:
        native.module.use(before)


@pytest.fixture(params=["reference", *KERNELS, *CUDA, *INTERPRETED])
def backend(request):
    """Every backend, cpu once per instruction set, cuda emulated, triton interpreted; ops run on it within the test."""
    with within(request.param) as name:
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request):
    """The C++ kernels alone, once per instruction set: what does not concern the twin."""
    with within(request.param) as name:
        yield name


@pytest.fixture(params=[*GPU[1:], *INTERPRETED])
def triton(request):
    """The Triton kernels alone, however many programs they take."""
    with within(request.param, most_programs=0) as name:
        yield name


@pytest.fixture(params=["reference", *(["cpu"] if KERNELS else []), *GPU, "cuda:values"])
def best(request):
    """Every backend once, the cpu backend by its best instruction set: what lies above the kernels."""
    with within(request.param) as name:
        yield name


@pytest.fixture(params=["cpu", "cuda:values"])
def modules(request):
    """Each C++ module once: what they have besides kernels."""
    with within(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """Memory that nobody wrote reads as NaN, so that an output's forgotten place shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["onednn", "fastbert"])
def library(request):
    """Each library besides torch's own that is here, chosen within the test."""
    try:
        linear.check(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    with fastbert.use_linear(request.param):
        yield request.param
