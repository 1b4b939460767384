import os
import subprocess
import sys

import pytest
import torch

import fastbert
from fastbert import backend, native


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_an_explicit_choice_that_cannot_run_raises_with_the_reason():
    with (
        pytest.raises(
            RuntimeError, match=r"backend 'triton' was asked for and cannot run here: version .* has no triton"
        ),
        fastbert.use_backend("triton"),
    ):
        pass
    with pytest.raises(ValueError, match="expected one of reference, cpu"), fastbert.use_backend("gpu"):
        pass
    with pytest.raises(RuntimeError, match="cannot run here"):
        fastbert.gelu(torch.randn(3), backend="cuda")


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_dtype_decides():
    x = torch.randn(3, dtype=torch.float64)
    backend.fallbacks.clear()
    fastbert.gelu(x)
    assert "got torch.float64" in backend.fallbacks["gelu", "cpu"]
    with pytest.raises(RuntimeError, match=r"cannot run gelu here: it takes .*, got torch\.float64"):
        fastbert.gelu(x, backend="cpu")


def test_the_block_decides_and_ends():
    with fastbert.use_backend("reference"):
        assert backend.requested() == "reference" and backend.requested("cpu") == "cpu"
        with pytest.raises(ZeroDivisionError), fastbert.use_backend("reference"):
            raise ZeroDivisionError
        assert backend.requested() == "reference"
    assert backend.requested() == os.environ.get("FASTBERT_BACKEND", "")


def test_environment_decides():
    code = "import torch, fastbert; fastbert.gelu(torch.randn(3))"
    assert python(code, FASTBERT_BACKEND="reference").returncode == 0
    failed = python(code, FASTBERT_BACKEND="cuda")
    assert failed.returncode == 1 and "backend 'cuda' was asked for and cannot run here" in failed.stderr


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_instruction_set_can_be_forced():
    code = "from fastbert import backend, native; assert native.isa == native.module.selected(); print(backend.info())"
    for isa in native.module.instruction_sets():
        assert f"instruction set  {isa} forced by FASTBERT_CPU_ISA (this" in python(code, FASTBERT_CPU_ISA=isa).stdout
    failed = python(code, FASTBERT_CPU_ISA="mmx")
    assert failed.returncode == 1
    for part in ("ValueError: FASTBERT_CPU_ISA names", "no kernels for an instruction set 'mmx': expected one of"):
        assert part in failed.stderr


def test_an_instruction_set_without_the_module_is_refused():
    code = "import sys; sys.modules['fastbert._cpu'] = None; import fastbert"
    assert python(code, FASTBERT_CPU_ISA="").returncode == 0
    failed = python(code, FASTBERT_CPU_ISA="avx2")
    assert failed.returncode == 1 and "'avx2' cannot be had: the C++ module is not there" in failed.stderr


def test_info_names_every_op_and_backend():
    text = backend.info()
    for word in (*backend.OPS, *backend.NAMES, torch.__version__, "instruction set", "threads"):
        assert word in text
    assert ("forced" in text) == bool(os.environ.get("FASTBERT_CPU_ISA"))
    for name in backend.NAMES:
        reason = backend.why_not(name)
        assert reason is None or f"{name}: {reason}" in text


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_one_pool_of_threads():
    """The module shares torch's OpenMP runtime; a second one would double the threads."""
    code = (
        "import torch, fastbert; fastbert.gelu(torch.randn(512, 768)); torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "print({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l or 'libiomp' in l})"
    )
    assert len(eval(python(code).stdout)) == 1
