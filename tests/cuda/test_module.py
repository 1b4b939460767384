"""What surrounds the kernels of `_cuda`: which GPUs it takes, why not, errors, faults, streams, and how it is built."""

import contextlib
import re
import runpy
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import emulated
import emulated_backend
import pytest
import torch
from build_cache import ROOT

import fastbert
from fastbert.backends import gpu, info, why_not

# ---- why not -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine(missing=None, cuda="13.0", available=True, driver=13000, built_by=13000, archs=(75, 80, 90), has=(9, 0)):
    """As if the module, torch and the machine were these."""
    properties = SimpleNamespace(name="a GPU", major=has[0], minor=has[1])
    module = SimpleNamespace(version=built_by, architectures=lambda: list(archs))
    with (
        mock.patch.object(gpu, "missing", missing),
        mock.patch.object(gpu, "module", module),
        mock.patch.object(torch.version, "cuda", cuda),
        mock.patch.object(torch.cuda, "is_available", lambda: available),
        mock.patch.object(torch._C, "_cuda_getDriverVersion", lambda: driver, create=True),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
    ):
        yield


@pytest.mark.parametrize(
    "what, said",
    [
        ({"missing": "it was not built"}, "it was not built"),
        ({"cuda": None}, "is built without CUDA"),
        ({"available": False, "driver": 0}, "there is no CUDA driver"),
        ({"available": False}, "the CUDA driver shows no GPU"),
        ({"driver": 12080}, "runs programs up to CUDA 12.8, and the module was built by 13.0: update the driver"),
    ],
)
def test_a_machine_that_cannot_is_told_why(what, said):
    with machine(**what):
        assert said in why_not("cuda") and said in info()
        with pytest.raises(RuntimeError, match="backend 'cuda' was asked for"), fastbert.use_backend("cuda"):
            pass


def test_a_machine_that_can():
    names = mock.patch.multiple(torch.cuda, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}")
    with machine(driver=13010, built_by=13000), names:
        assert why_not("cuda") is None and "cuda" in fastbert.backends()
        assert "GPU              GPU 0: ok; GPU 1: ok (kernels for sm_75, sm_80, sm_90, by CUDA 13.0)" in info()


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_ops_are_registered_for_it(key):
    for name in ("gelu_backward", "layer_norm", "dropout", "cross_entropy_forward", "attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{name}", key)


@pytest.mark.parametrize(
    "archs, has, dtype, said",
    [
        ((75, 80, 90), (9, 0), torch.bfloat16, None),
        ((75, 80, 90), (8, 9), torch.bfloat16, None),  # by sm_80's code
        ((75, 80, 90), (12, 0), torch.bfloat16, None),  # compiled anew from sm_90's
        ((75, 80, 90), (7, 5), torch.float16, None),
        ((75, 80, 90), (7, 5), torch.bfloat16, "bfloat16 needs sm_80 or later, and a GPU is sm_75"),
        ((75, 80, 90), (7, 0), torch.float32, "a GPU is sm_70, and the kernels run from sm_75 on"),
        ((90,), (8, 6), torch.float32, "compiled for sm_90: install .* anew, with FASTBERT_CUDA_ARCHS=86"),
        ((80, 120), (9, 0), torch.float32, "compiled for sm_80, sm_120: "),
        ((75,), (9, 0), torch.bfloat16, "bfloat16 needs the module to be compiled for sm_80 or later"),
    ],
)
def test_which_gpus_and_dtypes_are_taken(archs, has, dtype, said):
    with machine(archs=archs, has=has):
        reason = gpu.refusal(0, dtype)
    assert reason is None if said is None else re.search(said, reason), reason


def test_a_compiler_takes_the_answers_as_constants():
    """How they are found cannot be traced: the driver is asked, here in place of it the clock."""

    def ask(x):
        return x + (1 if gpu.why_not() is None else 2) + (4 if gpu.refusal(0, torch.float32) is None else 8)

    with machine(available=False), mock.patch.object(torch._C, "_cuda_getDriverVersion", time.time_ns):
        assert torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(())) == 2 + 4
    torch.compiler.reset()


# ---- calls ---------------------------------------------------------------------------------------------------------


def test_kernels_start_on_the_tensors_device_and_its_current_stream():
    """Where the current device is another one, it is switched for the call alone."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    module = SimpleNamespace(run=lambda *arguments: seen.append((current[0], arguments)))
    with (
        mock.patch.object(gpu, "module", module),
        mock.patch.object(gpu, "_reports", True),
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(torch._C, "_cuda_getDevice", lambda: current[0], create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, create=True),
    ):
        for index in (0, 1):
            kernels, stream = gpu.launcher(index)
            kernels.run("x", stream)
    assert seen == [(0, ("x", 100)), (1, ("x", 101))] and current == [0]


@pytest.mark.skipif(gpu.module is None, reason=str(gpu.missing))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch works here")
def test_without_a_driver_a_launch_says_what_cuda_says():
    x = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"gelu_forward: .+ \(cudaError\w+\), grid \(1, 1, 1\), block"):
        gpu.module.gelu_forward(x.data_ptr(), 0, False, x.data_ptr(), 1, 8, 0, 0, 0)
    with pytest.raises(TypeError, match="gelu_forward takes the 9 fields of its struct"):
        gpu.module.gelu_forward(x.data_ptr())


@pytest.fixture(scope="module")
def emulated_cuda():
    if reason := emulated.why_not():
        pytest.skip(reason)
    return emulated_backend.module(trace=False)


def test_a_failed_launch_raises_and_the_next_one_works(emulated_cuda):
    x = torch.ones(4, 8)
    with emulated_backend.installed(emulated_cuda):
        with pytest.raises(RuntimeError, match="gelu_forward: invalid address: null"):
            emulated_cuda.compiled.gelu_forward(0, 0, False, x.data_ptr(), 4, 8, 0, 0, 0)
        assert torch.equal(fastbert.gelu(x, backend="cuda")[0], fastbert.gelu(x, backend="cuda")[3])


def test_what_a_kernel_found_is_raised_once_by_the_next_call(emulated_cuda):
    x = torch.ones(4, 8)
    with emulated_backend.installed(emulated_cuda):
        emulated_cuda.fault_words[0] = 1 + 7
        with pytest.raises(ValueError, match=r"in an earlier call: cross_entropy was given a label .* in row 7: "):
            fastbert.gelu(x, backend="cuda")
        fastbert.gelu(x, backend="cuda")
        emulated_cuda.fault_words[1] = emulated_cuda.fault_words[2] = 1
        with pytest.raises(ValueError, match=r"at sequence 0: .*; lazy_adam was given a row id .* place 0 of rows"):
            fastbert.check_device_errors()
        fastbert.check_device_errors()


def test_reports_go_to_memory_of_the_modules_own_at_the_first_call(emulated_cuda):
    """Once; it is allocated by CUDA itself, so that a graph may capture the first call."""
    asked = []
    module = SimpleNamespace(report_faults=lambda: asked.append(emulated_cuda.compiled.report_faults()))
    try:
        with (
            mock.patch.object(gpu, "module", module),
            mock.patch.object(gpu, "_reports", False),
            mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
            mock.patch.object(torch._C, "_cuda_getDevice", lambda: 0, create=True),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        ):
            assert [gpu.launcher(0), gpu.launcher(0)] == [(module, 0)] * 2 and asked == [None]
        x, labels, results = torch.zeros(2, 4), torch.tensor([1, 9]), torch.empty(3, 2)
        emulated_cuda.library.start()
        emulated_cuda.compiled.cross_entropy_forward(
            x.data_ptr(),
            labels.data_ptr(),
            -100,
            False,
            *(each.data_ptr() for each in results),
            *[0] * 3,
            2,
            4,
            4,
            0,
            0,
        )
        with pytest.raises(ValueError, match="in row 1: "):
            emulated_cuda.compiled.check_faults()
        assert not emulated_cuda.fault_words.any()
    finally:
        emulated_cuda.compiled.report_faults_to(emulated_cuda.fault_words.data_ptr())


# ---- the emulated backend ------------------------------------------------------------------------------------------


def test_the_contract_is_read_from_its_header():
    backward = emulated_backend.contract()["attention_backward"]
    # the base's come first
    assert [field.name for field in backward[:5]] == ["q", "k", "v", "cu_seqlens", "max_seqlen"]
    pointers = {field.name: field.use for field in backward if field.is_pointer}
    taken = ["q", "k", "v", "cu_seqlens", "seed", "global_tokens", "query_ranks", "key_ranks", "dout", "out", "lse"]
    assert list(pointers) == [*taken, "dqkv", "scratch"]
    assert [name for name, use in pointers.items() if use is not None] == ["dqkv", "scratch"]
    step = {field.name: field.use for field in emulated_backend.contract()["lazy_adam_step"] if field.is_pointer}
    of_others = {"last_step", "dtable"}
    assert {name for name, use in step.items() if use is emulated.InOut} == emulated_backend.IN_PLACE - of_others
    assert step["grad"] is None and step["scratch"] is emulated.Output


def test_an_address_that_is_no_tensors_is_noticed(emulated_cuda):
    x = torch.ones(1, 8)
    with emulated_cuda.running(), pytest.raises(AssertionError, match="no tensor was asked for the address of y"):
        emulated_cuda.gelu_forward(x.data_ptr(), 0, False, 4096, 1, 8, 0, 0, 0)


# ---- the build -----------------------------------------------------------------------------------------------------


@pytest.fixture
def building(monkeypatch, tmp_path):
    """What setup.py does with such an environment and an nvcc that lists these GPUs."""

    def run(listed=("75", "80", "90", "100", "120"), **environment):
        for name in ("FASTBERT_CUDA", "FASTBERT_CUDA_ARCHS", "FASTBERT_BUILD", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in listed))
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        for name, value in ({"CUDA_HOME": str(tmp_path)} | environment).items():
            monkeypatch.setenv(name, value)
        made = {}
        with mock.patch("setuptools.setup", made.update):
            setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
        return setup, [extension.name for extension in made["ext_modules"]]

    return run


def test_nvcc_decides_whether_the_module_is_built(building):
    setup, names = building()
    assert names == ["fastbert._cpu", "fastbert._cuda"]
    plan = "\n".join(setup.cuda_plan("/usr/bin/g++", Path("/x/_cuda.so")))
    for arch in (75, 80, 90, 100, 120):
        assert f"-gencode arch=compute_{arch},code=sm_{arch} " in plan
    assert "-gencode arch=compute_120,code=compute_120" in plan and "-DFASTBERT_CUDA_ARCHS=75,80,90,100,120" in plan
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        assert f"compile_cuda {source}" in plan
    assert building(FASTBERT_CUDA="0")[1] == building(FASTBERT_SANITIZE="1")[1] == ["fastbert._cpu"]
    assert building(FASTBERT_BUILD="0")[1] == []


def test_headers_and_ninja_are_found_where_there_is_no_package_of_them(building, monkeypatch):
    """torch carries pybind11's headers; a system has a ninja."""
    setup, _ = building()
    there = {"torch": setup.find_spec("torch")}
    monkeypatch.setitem(setup.find_ninja.__globals__, "find_spec", there.get)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert (Path(setup.pybind11_include()) / "pybind11/pybind11.h").exists() and setup.find_ninja() == "/usr/bin/ninja"
    there.clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    for find, name in ((setup.pybind11_include, "pybind11"), (setup.find_ninja, "ninja")):
        with pytest.raises(SystemExit, match=f"which (is|are) not here: pip install {name}"):
            find()


def test_an_old_nvcc_compiles_for_the_gpus_that_it_knows(building):
    plan = "\n".join(building(("50", "75", "120"))[0].cuda_plan("/usr/bin/g++", Path("/x/_cuda.so")))
    assert "sm_120" in plan and "sm_50" not in plan and "compress" not in plan  # CUDA 12's needs a driver of its own
    assert building(("50", "75", "80", "86", "90"))[0].cuda_archs() == [75, 80, 90]
    assert building(("75", "86", "90"), FASTBERT_CUDA_ARCHS="86, 75")[0].cuda_archs() == [75, 86]


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"FASTBERT_CUDA_ARCHS": "ninety"}, "FASTBERT_CUDA_ARCHS=ninety: expected numbers such as '80 90'"),
        ({"FASTBERT_CUDA_ARCHS": "70 90"}, "out of those that .*/nvcc compiles for .*: 75, 80, 90, 100, 120"),
        ({"FASTBERT_CUDA_ARCHS": "130"}, "FASTBERT_CUDA_ARCHS=130: expected"),
        ({"FASTBERT_CUDA": "yes"}, "FASTBERT_CUDA must be 0 .* or 1 .*, got 'yes'"),
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc"),
        ({"listed": ()}, "names no GPU"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_compiled(building, environment, said):
    with pytest.raises(SystemExit, match=said):
        building(**environment)


def test_a_demand_without_nvcc_is_refused(building, monkeypatch):
    setup, _ = building()
    monkeypatch.setitem(setup.cuda_wanted.__globals__, "find_nvcc", lambda: None)
    assert not setup.cuda_wanted()
    monkeypatch.setenv("FASTBERT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FASTBERT_CUDA=1 demands .* there is no nvcc: install"):
        setup.cuda_wanted()
