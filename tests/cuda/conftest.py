"""What the tests of CUDA sources share: the emulator's builds."""

from pathlib import Path

import emulated
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
