import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import fastbert
from fastbert.backends import NAMES, OPS, fallbacks, info, linear, native, requested, why_not

# Both choices of a block, with what they are asked by and two names that any build takes.
CHOICES = pytest.mark.parametrize(
    ("use", "requested", "names"),
    [
        (fastbert.use_backend, requested, ("reference", fastbert.backends()[1])),
        (fastbert.use_linear, linear.requested, ("torch", "widened")),
    ],
    ids=["use_backend", "use_linear"],
)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_environment_decides_and_what_cannot_run_raises_with_the_reason():
    """In a process without a GPU, and without the module."""
    code = """
import sys; sys.modules["fastbert._cpu"] = None
import torch, fastbert
assert "cpu" not in fastbert.backends()
for use in (lambda: fastbert.use_backend("triton").__enter__(), lambda: fastbert.gelu(torch.randn(3))):
    try: use()
    except RuntimeError as error: print(error)
"""
    none = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "", "FASTBERT_CPU_ISA": ""}
    ended = python(code, FASTBERT_BACKEND="cuda", **none)
    triton, cuda = ended.stdout.splitlines()
    assert triton.startswith("backend 'triton' was asked for and cannot run here: torch sees no GPU")
    assert cuda.startswith("backend 'cuda' was asked for and cannot run")


def test_an_explicit_choice_that_cannot_run_raises():
    with pytest.raises(ValueError, match="expected one of reference, cpu"), fastbert.use_backend("gpu"):
        pass
    with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot run"):  # nor would a GPU take this tensor
        fastbert.gelu(torch.randn(3), backend="cuda")


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_dtype_decides():
    x = torch.randn(3, dtype=torch.float64)
    fallbacks.clear()
    fastbert.gelu(x)
    assert "got torch.float64" in fallbacks["gelu", "cpu"]
    with pytest.raises(RuntimeError, match=r"cannot run gelu here: it takes .*, got torch\.float64"):
        fastbert.gelu(x, backend="cpu")


def test_the_block_decides_and_ends():
    with fastbert.use_backend("reference"):
        assert requested() == "reference" and requested("cpu") == "cpu"
        with pytest.raises(ZeroDivisionError), fastbert.use_backend("reference"):
            raise ZeroDivisionError
        assert requested() == "reference"
    assert requested() == os.environ.get("FASTBERT_BACKEND", "")


@CHOICES
def test_overlapping_blocks_of_two_threads_keep_to_themselves(use, requested, names):
    """Each begins before and ends after the other's middle."""
    before, together, seen = requested(), threading.Barrier(2, timeout=30), {}

    def overlapping(name):
        with use(name):
            together.wait()
            seen[name] = requested()
            together.wait()
        together.wait()
        seen["after", name] = requested()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(overlapping, names))
    for name in names:
        assert seen[name] == name and seen["after", name] == before
    assert requested() == before


@CHOICES
def test_overlapping_blocks_of_two_tasks_keep_to_themselves(use, requested, names):
    before = requested()

    async def overlapping(name):
        with use(name):
            await asyncio.sleep(0)
            seen = requested()
            await asyncio.sleep(0)
        return seen

    async def both():
        return await asyncio.gather(*map(overlapping, names))

    assert asyncio.run(both()) == list(names) and requested() == before


@CHOICES
def test_a_thread_inherits_a_choice_with_the_context_alone(use, requested, names):
    before = requested()
    with use(names[0]), ThreadPoolExecutor(1) as pool:
        assert pool.submit(requested).result() == before
        assert pool.submit(contextvars.copy_context().run, requested).result() == names[0]


def ops_of(run):
    """The kernels' ops that run; the twins are none."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sorted({event.name[10:] for event in profiler.events() if event.name.startswith("fastbert::")})


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_backward_runs_where_forward_ran_in_any_thread():
    x = torch.randn(4, requires_grad=True)
    with fastbert.use_backend("reference"):
        y = fastbert.gelu(x).sum()
    with fastbert.use_backend("cpu"), ThreadPoolExecutor(1) as pool:
        z = fastbert.gelu(x).sum()
        assert ops_of(lambda: pool.submit(y.backward).result()) == []
    with fastbert.use_backend("reference"):
        assert ops_of(z.backward) == ["gelu_backward"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_a_compiled_function_follows_the_block_it_is_called_in():
    """Of its caller's thread, again and again, forward and backward, with one graph for each choice."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastbert.gelu, fullgraph=True, backend=counter)
    x, results = torch.randn(4, requires_grad=True), []
    for _ in range(3):
        for name in ("cpu", "reference"):
            with fastbert.use_backend(name), ThreadPoolExecutor(1) as pool:
                compiled(x)  # compiles, where it has to
                forward = ops_of(lambda: results.append(compiled(x).sum()))
                pool.submit(compiled, x).result()  # in a thread without a choice
            backward = ops_of(results.pop().backward)  # after the block
            assert forward + backward == ["gelu_forward", "gelu_backward"] * (name == "cpu"), name
    assert counter.frame_count == 3  # for "cpu", for "reference" and for no choice


@pytest.fixture(scope="module")
def forced():
    """The lowest instruction set, which is not what is chosen by itself, and what a process says that is told it."""
    isa = native.module.instruction_sets()[0]
    code = """
import os
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"): os.environ.pop(name, None)  # which fastbert's commands set
before = dict(os.environ)
import torch, fastbert, fastbert.cli
from fastbert.backends import info, native
assert dict(os.environ) == before, "importing the package leaves the environment alone"
assert native.isa == native.module.selected()
fastbert.gelu(torch.randn(512, 768)); torch.randn(512, 512) @ torch.randn(512, 512)
print({l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l or "libomp" in l or "libiomp" in l})
print(info())
"""
    ended = python(code, FASTBERT_CPU_ISA=isa)
    assert ended.returncode == 0, ended.stderr
    return isa, *ended.stdout.split("\n", 1)


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_instruction_set_can_be_forced(forced):
    isa, _, said = forced
    assert f"instruction set  {isa} forced by FASTBERT_CPU_ISA (this" in said
    use = (
        "fastbert.gelu(torch.ones(3))", "fastbert.backends()", "fastbert.use_backend('cpu').__enter__()",
        "fastbert.use_linear('fastbert').__enter__()", "info()",
    )  # fmt: skip
    code = f"""
import torch, fastbert
from fastbert.backends import info
assert fastbert.gelu(torch.zeros(3), backend="reference").sum() == 0
for use in {use}:
    try: exec(use)
    except ValueError as error: print(error)
"""
    failed = python(code, FASTBERT_CPU_ISA="mmx").stdout.splitlines()
    assert len(failed) == len(use) and len(set(failed)) == 1
    for part in ("FASTBERT_CPU_ISA names the", "no kernels for an instruction set 'mmx': expected one of"):
        assert part in failed[0]


def test_an_instruction_set_without_the_module_is_refused(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "cpu_missing", "it was not built")
    monkeypatch.setattr(native, "forced_isa", "avx2")  # FASTBERT_CPU_ISA, read when the package is imported
    assert "'avx2' cannot be had: it was not built" in native._why_not_forced()


def test_info_names_every_op_and_backend():
    text = info()
    for word in (*OPS, *NAMES, torch.__version__, "instruction set", "threads"):
        assert word in text
    assert ("forced" in text) == bool(os.environ.get("FASTBERT_CPU_ISA"))
    for name in NAMES:
        reason = why_not(name)
        assert reason is None or f"{name}: {reason}" in text


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
def test_one_pool_of_threads(forced):
    """The module shares torch's OpenMP runtime; a second one would double the threads."""
    assert len(eval(forced[1])) == 1
