"""Every instruction set this machine has is tested, not only the best.

The op tests visit each in turn within one process, through the fixture `backend`: that they do is held here. A whole
model runs once per lower instruction set in a process of its own, forced by FASTBERT_CPU_ISA as a user would. Where the
processor has AVX-512-BF16 but no AMX, the kernels for AMX run with each of its instructions emulated; where it has AVX2
but no AVX-512, the kernels for AVX-512 and AVX-512-BF16 are compiled into AVX2's instructions.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert.backends import native, requested
from fastbert.ops.lazy_adam import NO_BIAS_CORRECTION, lazy_adam_step

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
OPS = ("gelu", "layer_norm", "cross_entropy", "attention", "linear_product", "lazy_adam", "lazy_adam_replay")
ISAS = native.module.instruction_sets() if native.module else []


def pytest_process(*arguments, **environment):
    """A pytest of its own; FASTBERT_BACKEND would take the choice from it."""
    environment = {**os.environ, "FASTBERT_BACKEND": "", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.nested
@pytest.mark.skipif(not ISAS, reason="the C++ module is not built")
def test_every_op_is_tested_on_every_instruction_set():
    listing = pytest_process("--collect-only", *(TESTS / f"ops/test_{op}.py" for op in OPS))
    found = collections.Counter(re.findall(r"test_(\w+)\.py::\w+\[[^\]]*cpu:(\w+)", listing))
    for op in OPS:
        counts = {isa: found[op, isa] for isa in ISAS}
        assert len(set(counts.values())) == 1 and counts[ISAS[0]] >= 10, (op, counts)


@pytest.mark.parametrize("backend", [f"cpu:{isa}" for isa in ISAS], indirect=True)
def test_float16_is_read_and_rounded_exactly(backend):
    """Every float16, and float32 at, beside and halfway between them: sets without an instruction for it compute it."""
    every = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    finite = every[every.isfinite()].float().unique()  # from -65504 to 65504, one zero
    beyond = torch.tensor([65520.0, 65519.996, 65536.0, 1e6, 1e-8, 1e-30, 2**-25, torch.nan])
    halfway = (finite[1:] + finite[:-1]) / 2
    numbers = torch.cat([finite, halfway, beyond, -beyond])
    numbers = torch.cat([numbers, *(numbers.nextafter(torch.tensor(to)) for to in (-torch.inf, torch.inf))])

    def step(w, m, rate, beta1):  # w - rate * m, as nothing decays, v is 0, eps is 1 and the gradient too is 0
        v, zero = torch.zeros(w.shape, dtype=torch.float32), torch.zeros(w.shape, dtype=torch.float32)
        options = None, beta1, 0.5, 1.0, 0.0, NO_BIAS_CORRECTION, -1, 0, None, None, None, requested()
        lazy_adam_step(w, m, v, None, None, None, zero, torch.tensor(rate), torch.tensor(1.0), *options)
        return w

    kept = step(every.clone()[None], torch.zeros(1, len(every)), 0.0, 1.0)[0]
    assert torch.equal(kept.nan_to_num(nan=7.0, posinf=8.0), every.nan_to_num(nan=7.0, posinf=8.0))
    rounded = step(torch.zeros(1, len(numbers), dtype=torch.float16), -numbers[None], 1.0, 1.0)[0]
    assert torch.equal(rounded.isnan(), numbers.isnan())
    assert torch.equal(rounded.nan_to_num(nan=7.0, posinf=8.0), numbers.half().nan_to_num(nan=7.0, posinf=8.0))


@pytest.mark.nested
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_a_model_on_a_lower_instruction_set(isa):
    """Modules and the whole BERT: 20 steps with the loss curve of a plain PyTorch BERT, dropout, bfloat16, padding.

    What compiles is left out: it takes ten times as long and calls the same kernels.
    """
    selection = "(cpu or backend) and not compiles"
    output = pytest_process(
        "-k", selection, TESTS / "models/test_layers.py", TESTS / "models/test_bert.py", FASTBERT_CPU_ISA=isa
    )
    assert int(re.search(r"(\d+) passed", output)[1]) >= 12, output[-1000:]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The library that, loaded before Python, does what AMX's instructions do."""
    if "avx512_bf16" not in ISAS or "amx_bf16" in ISAS or shutil.which("g++") is None:
        pytest.skip("needs AVX-512-BF16 without AMX, and g++")
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    source = TESTS / "amx_emulator.cpp"
    subprocess.run(["g++", "-O2", "-std=c++17", "-fPIC", "-shared", source, "-o", library], check=True)
    return str(library)


@pytest.mark.nested
def test_attention_on_emulated_amx(emulator):
    """What attention on tiles is held to is what it is held to on vectors; the slowest combinations are left out."""
    selection = "amx_bf16 and not torch.float32 and not torch.float16 and not (long and all)"
    visible = TESTS / "ops/test_attention_visible.py"
    tests = TESTS / "ops/test_attention.py", visible, f"{TESTS / 'ops/test_shapes.py'}::test_attention"
    output = pytest_process("-p", "no:faulthandler", "-k", selection, *tests, LD_PRELOAD=emulator)
    assert int(re.search(r"(\d+) passed", output)[1]) >= 60, output[-1000:]


@pytest.mark.nested
def test_amx_is_left_to_those_who_name_it(emulator):
    code = "from fastbert.backends import info, native; print(native.isa); print(info())"
    for named, chosen in (("", "avx512_bf16"), ("amx_bf16", "amx_bf16")):
        environment = {**os.environ, "LD_PRELOAD": emulator, "FASTBERT_BACKEND": "", "FASTBERT_CPU_ISA": named}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"{chosen}\n"), done.stdout
        assert "amx_bf16; amx_bf16, so far tested by emulation alone, where FASTBERT_CPU_ISA names it)" in done.stdout


@pytest.mark.nested
def test_products_use_tiles(emulator):
    """Counted for a head of 64 and 56 tokens: three whole tiles of 16 rows, columns padded to four."""
    code = """
import ctypes, os, torch, fastbert
torch.set_num_threads(1)  # one task for queries and keys
products = ctypes.c_int64.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "fastbert_amx_emulator")
q, k, v = (torch.randn(56, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
out = fastbert.attention(q, k, v, torch.tensor([0, 56], dtype=torch.int32), 56)
print(products.value)
out.sum().backward()
print(products.value)
"""
    environment = {**os.environ, "LD_PRELOAD": emulator, "FASTBERT_BACKEND": "cpu", "FASTBERT_CPU_ISA": "amx_bf16"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    scores, weighted = 3 * 4 * 2, 3 * 4 * 1  # rows x columns x depth: 32 words of a head, 28 of the tokens
    forward, backward = scores + weighted, 2 * scores + 3 * weighted
    assert done.stdout.split() == [str(forward), str(forward + backward)]


@pytest.mark.nested
def test_every_op_on_emulated_avx512(tmp_path):
    """Left out is what `make emulate` runs besides: float16, numbers of threads, and the slowest combinations."""
    if "avx2" not in ISAS or "avx512" in ISAS or shutil.which("g++") is None:
        pytest.skip("needs AVX2 without AVX-512, and g++")
    library = tmp_path / "lib"
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build", "--build-lib", library]
    environment = {**os.environ, "FASTBERT_EMULATE": "1", "CXX": "g++"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    tests = [TESTS / f"ops/test_{stem}.py" for stem in (*OPS, "philox", "shapes")]
    selection = (
        "(avx512 or known_answers) and not torch.float16 and not threads and not long and not adamw and not sound"
    )
    environment = {"PYTHONPATH": str(library), "PYTHONSAFEPATH": "1", "FASTBERT_CPU_ISA": ""}
    output = pytest_process("-k", selection, *tests, **environment)
    assert int(re.search(r"(\d+) passed", output)[1]) >= 600, output[-1000:]
