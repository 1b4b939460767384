"""Compiled for real GPUs, kernels keep to budget.csv. A new kernel is one line there:

source, kernel     the file, and its name as sass.py gives it; `*` stands for any template arguments
threads            of a block; dynamic_shared: bytes of a launch
registers          at most, on any architecture
blocks_per_sm      at least, by architecture
instructions       that must be there, `!` before one that must not; `@80` after one: from that architecture on.
                   A CALL on sm_80 may be how a loop ends; elsewhere it is a function, most often a division of int64

None spills, on any architecture, and none has local memory.
"""

import csv
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import build_cache
import pytest
import sass
from build_cache import ROOT

BUDGET = list(csv.DictReader(Path(__file__).with_name("budget.csv").read_text().splitlines()))
SOURCES = sorted({line["source"] for line in BUDGET})

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def held(source, arch):
    """The project's kernels are compiled where they are asked for; of the example one architecture is enough."""
    is_quick = source == "tests/cuda/demo.cu" and arch == 80
    return pytest.param(source, arch, id=f"{source}-sm_{arch}", marks=[] if is_quick else pytest.mark.nested)


@pytest.fixture(scope="module")
def reports(request):
    """Of each source and architecture that a test asks for, on its way: as many at a time as there are cores."""
    asked = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    asked = [
        tuple(each.params[name] for name in ("source", "arch")) for each in asked if each and "arch" in each.params
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {each: pool.submit(sass.report, ROOT / each[0], each[1]) for each in asked}
        pool.shutdown(cancel_futures=True)


@needs_nvcc
@pytest.mark.parametrize(("source", "arch"), [held(source, arch) for source in SOURCES for arch in sass.ARCHS])
def test_kernels_keep_to_the_budget(reports, source, arch):
    kernels = reports[source, arch].result()
    unkept, unused = [], [line["kernel"] for line in BUDGET if line["source"] == source]
    for kernel in kernels:
        lines = [line for line in BUDGET if line["source"] == source and fnmatchcase(kernel.name, line["kernel"])]
        assert len(lines) == 1, f"budget.csv has {len(lines)} lines for {source} {kernel.name}; it needs one"
        unkept += [f"sm_{arch} {kernel.name}: {text}" for text in sass.exceeded(kernel, lines[0], arch)]
        unused = [name for name in unused if name != lines[0]["kernel"]]
    assert not unkept, "\n".join(unkept)
    assert not unused, f"budget.csv has lines for {source} without a kernel: {unused}"


@needs_nvcc
def test_instructions_are_read(tmp_path):
    if sass.nvdisasm() is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    (kernel,) = [k for k in sass.report(ROOT / "tests/cuda/demo.cu", 80) if k.name == "matmul_kernel<__half>"]
    assert kernel.instructions["HMMA"] % 4 == 0 and kernel.instructions["LDGSTS.128"] >= 2


@needs_nvcc
@pytest.mark.parametrize("name", ["planted.cu", "intrinsics.cu"])
def test_what_the_emulator_executes_is_cuda(name):
    assert sass.report(Path(__file__).with_name(name), 80)


def test_only_what_a_source_includes_compiles_it_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cache, "CACHE", tmp_path / "cache")
    source, header, other = (tmp_path / name for name in ("a.cpp", "a.h", "other.h"))
    source.write_text('#ifdef NEVER\n  #include "a.h"\n#endif\n')
    for path in (header, other):
        path.write_text("")
    made = lambda: build_cache.built(source, ["g++", "-E", str(source)], ".i")  # noqa: E731
    first = made()
    other.write_text("// changed")
    assert made() == first
    header.write_text("// changed")
    assert made() != first
    kernels = {path.name for path in build_cache.included(ROOT / "csrc/cuda/gelu.cu")}
    assert {"gelu.cu", "contract.h", "gelu_scratch.h", "emulator.h"} <= kernels and "lazy_adam_sort.h" not in kernels


def test_the_budget_notices():
    line = {"threads": "256", "dynamic_shared": "8192", "registers": "64", "blocks_per_sm": "80:5"}
    line["instructions"] = "LDG.128 HMMA@90 !CALL"
    kept = sass.Kernel("k", registers=48, stack=0, spills=0, shared=1024, instructions=Counter({"LDG.128": 2}))
    assert list(sass.exceeded(kept, line, 80)) == []
    grown = sass.Kernel("k", registers=72, stack=8, spills=8, shared=40960, instructions=Counter({"CALL": 1}))
    assert list(sass.exceeded(grown, line, 80)) == [
        "8 bytes spilled, 8 bytes of local memory",
        "72 registers, at most 64",
        "3 blocks per SM, at least 5",
        "LDG.128 is missing",
        "CALL is there",
    ]


def test_occupancy_by_hand():
    """sm_90: 65,536 registers in four parts, 2,048 threads, 228 KiB of shared memory, 1 KiB of it taken per block."""
    kernel = sass.Kernel("k", registers=40, stack=0, spills=0, shared=0, instructions=None)
    assert sass.blocks_per_sm(kernel, 90, 128, 0) == 12  # 40 x 32 = 1,280 a warp, 12 warps in each part, 48 in all
    assert sass.blocks_per_sm(kernel, 90, 128, 56 << 10) == 4  # 57 KiB a block
    assert sass.blocks_per_sm(kernel, 90, 1024, 0) == 1  # 48 warps hold one block of 32
    kernel.registers = 32
    assert sass.blocks_per_sm(kernel, 90, 1024, 0) == 2  # by threads
    assert sass.blocks_per_sm(kernel, 75, 32, 0) == 16  # by the number of blocks
