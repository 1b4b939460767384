"""What the tests of CUDA sources share: the emulator's builds."""

from pathlib import Path

import emulated
import emulated_backend
import pytest

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(params=emulated.ORDERS)
def order(request):
    """Threads and blocks one after another, backwards, and shuffled twice."""
    return request.param


@pytest.fixture(scope="session", params=[False, True], ids=["values", "trace"])
def trace(request):
    return request.param


@pytest.fixture(scope="session")
def emulate():
    """Builds a source of this folder, once: `emulate("demo.cu", trace)`."""
    if reason := emulated.why_not():
        pytest.skip(reason)
    return lambda source, trace: emulated.Library.build(FOLDER / source, trace=trace)


@pytest.fixture(params=[False, True], ids=["values", "trace"])
def module(request):
    """The module of csrc/cuda in both builds."""
    with emulated_backend.chosen(request.param) as module:
        yield module


@pytest.fixture
def values():
    """Its value build."""
    with emulated_backend.chosen(trace=False) as module:
        yield module


@pytest.fixture
def traced():
    """Its trace of all blocks."""
    with emulated_backend.chosen(trace=True, sample=1 << 30) as module:
        yield module
