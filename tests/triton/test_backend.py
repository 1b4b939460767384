"""Why the backend triton does not run, in processes where it cannot; and what is chosen on a GPU, which is none."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import fastbert
from fastbert.backends import gpu, native, triton

backends = import_module("fastbert.backends")  # `fastbert.backends` is the function of that name


def python(code, *, path=None, **environment):
    """What a process prints, and says when it fails; `path` is searched first."""
    before = os.environ.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = f"{path}:{before}" if path else before
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return ran.stdout + ran.stderr


USE = "import torch, fastbert; print(fastbert.gelu(torch.ones(3), backend='triton'))"


def test_tensors_of_the_cpu_are_interpreted_or_refused():
    said = python(USE, TRITON_INTERPRET="", CUDA_VISIBLE_DEVICES="")
    assert "RuntimeError: backend 'triton' was asked for and cannot run here: torch sees no GPU" in said
    assert "TRITON_INTERPRET=1, set before fastbert is imported, runs the kernels on the CPU" in said


def test_a_missing_triton_is_said(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *given: None if name == 'triton' else find(name, *given)\n"
    )
    said = python(USE, path=tmp_path, TRITON_INTERPRET="1")
    assert "cannot run here: Triton is not installed: pip install triton" in said


def test_a_broken_triton_is_an_error_and_not_a_missing_one(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so: file too short')")
    said = python(USE, path=tmp_path, TRITON_INTERPRET="1")
    assert "RuntimeError: Triton is installed and cannot be imported (ImportError: libtriton.so: file too short" in said
    info = python("from fastbert.backends import info; print(info())", path=tmp_path, TRITON_INTERPRET="1")
    assert "Traceback" not in info and "triton: Triton is installed and cannot be imported" in info


@pytest.mark.parametrize(
    ("triton", "numpy", "said"),
    [
        ("3.5.1", "2.2.0", "the kernels need Triton 3.6 or later, and 3.5.1 is installed: pip install"),
        ("3.6.0", "2.4.1", "the interpreter of Triton 3.6 fails with numpy 2.4: pip install 'numpy<2.4'"),
        ("3.6.0", "2.3.9", None),
        ("3.7.1", "2.4.6", None),
        ("3.7.1+git1234", None, "Triton's interpreter needs numpy: pip install numpy"),
    ],
)
def test_versions(monkeypatch, triton, numpy, said):
    module = pytest.importorskip("triton")
    monkeypatch.setattr(module, "__version__", triton)
    monkeypatch.setattr(backends.triton, "interpreted", True)

    def version(name):
        if numpy is None:
            raise backends.triton.importlib.metadata.PackageNotFoundError(name)
        return numpy

    monkeypatch.setattr(backends.triton.importlib.metadata, "version", version)
    reason = backends.triton._missing.__wrapped__()
    assert reason is said is None or said in reason


class OnGpu:
    """What `pick` asks of a tensor."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def get_device(self):
        return 0


class Properties:
    name, major, minor = "a GPU", 8, 0


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU that is none, which torch and Triton would take."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(triton, "interpreted", False)
    monkeypatch.setattr(triton, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "why_not", lambda: "there is no nvcc")
    monkeypatch.setattr(backends, "_on_gpu", {})
    monkeypatch.setattr(backends, "fallbacks", {})
    monkeypatch.setattr(Properties, "major", 8)
    triton._refusal_on.cache_clear()
    yield
    triton._refusal_on.cache_clear()


def test_a_gpu_without_the_module_takes_triton_unasked(a_gpu, monkeypatch):
    assert backends.pick("gelu", "", OnGpu()) == backends.pick("gelu", "", OnGpu()) == "triton"
    assert backends._on_gpu == {(0, torch.float32): "triton"} and not backends.fallbacks
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "refusal", lambda device, dtype: None)
    assert backends.pick("gelu", "", OnGpu(torch.float16)) == "cuda"
    assert backends.pick("gelu", "triton", OnGpu()) == "triton"


def test_what_no_kernel_takes_runs_in_plain_pytorch_and_is_said_once(a_gpu, monkeypatch):
    monkeypatch.setattr(Properties, "major", 7)
    with pytest.warns(UserWarning, match=r"plain PyTorch .*cuda: there is no nvcc; triton: a GPU is sm_70, and the"):
        assert backends.pick("gelu", "", OnGpu()) == "reference"
    assert backends.pick("gelu", "", OnGpu()) == "reference"
    assert set(backends.fallbacks) == {("gelu", "cuda"), ("gelu", "triton")}
    with pytest.raises(RuntimeError, match="'triton' was asked for and cannot run gelu here: a GPU is sm_70"):
        backends.pick("gelu", "triton", OnGpu())
    monkeypatch.setattr(Properties, "minor", 5)
    triton._refusal_on.cache_clear()
    assert backends.pick("gelu", "", OnGpu()) == "triton"
    with pytest.raises(RuntimeError, match="bfloat16 needs sm_80 or later"):
        backends.pick("gelu", "triton", OnGpu(torch.bfloat16))


def test_amds_gpus_have_no_number_to_look_at(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(Properties, "major", 0)
    assert backends.pick("gelu", "", OnGpu(torch.bfloat16)) == "triton"


def test_explicitly_on_tensors_that_it_does_not_take(a_gpu):
    with pytest.raises(
        RuntimeError, match="it takes tensors on a GPU, got one on cpu; on the CPU only with TRITON_INT"
    ):
        fastbert.gelu(torch.ones(3), backend="triton")
    with pytest.raises(RuntimeError, match=r"it takes float32, bfloat16 and float16, got torch\.float64"):
        fastbert.gelu(torch.ones(3, dtype=torch.float64), backend="triton")
    assert native.DTYPES.keys() == {torch.float32, torch.bfloat16, torch.float16}
