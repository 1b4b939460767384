"""Fixtures shared by the op tests."""

import pytest
import torch

import fastbert
from fastbert.backends import native
from fastbert.ops import linear

BACKENDS = ["reference"] + [f"cpu:{isa}" for isa in (native.module.instruction_sets() if native.module else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend that runs here, the cpu backend once per instruction set; ops run on it within the test."""
    name, _, isa = request.param.partition(":")
    before = native.isa
    if isa:
        native.module.use(isa)
    with fastbert.use_backend(name):
        yield name
    if isa:
        native.module.use(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """Memory that nobody wrote reads as NaN, so that an output's forgotten place shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2, 3], ids="threads{}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["onednn", "fastbert"])
def library(request):
    """Each library besides torch's own that is here, chosen within the test."""
    try:
        linear.check(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    with fastbert.use_linear(request.param):
        yield request.param
