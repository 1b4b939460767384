"""What the tests of Triton's kernels share."""

import pytest

import fastbert
from fastbert.backends import triton, why_not


@pytest.fixture
def interpreted():
    """Within the test ops run on Triton's kernels, interpreted on tensors of the CPU, of any number of programs."""
    if reason := why_not("triton"):
        pytest.skip(reason)
    if not triton.interpreted:
        pytest.skip("there is a GPU, on which the tests of ops run")
    import interpreter

    with interpreter.installed(), fastbert.use_backend("triton"):
        yield
