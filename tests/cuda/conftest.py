"""What the tests of CUDA sources share: the emulator's builds, and this folder's modules by their names."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import emulated  # noqa: E402


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
