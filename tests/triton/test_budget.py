"""Compiled for GPUs that are not here, Triton's kernels keep to budget.csv. A new kernel is a line there, and a call in
aot_cases.py:

stem, kernel       whose launchers start it, and its name
case               dtype and shapes for which it is launched, as aot_cases.py names them; `*` stands for any
registers          of a thread at most, on any NVIDIA GPU
blocks_per_sm      programs at least, by architecture
instructions       as in tests/cuda/budget.csv: must be there, `|` between those of which one must, `!` before one
                   that must not, `@90` from sm_90 on
amd_registers      vector registers at most, on gfx942
amd_instructions   likewise; loads and stores by their width, "load.128"; MFMA for all of the matrix cores' products
local              bytes of local memory at most, on any GPU: what was spilled. Where nothing stands, 0
"""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import aot_cases
import pytest
import sass

pytest.importorskip("triton")
FOLDER = Path(__file__).resolve().parent
BUDGET = list(csv.DictReader((FOLDER / "budget.csv").read_text().splitlines()))


def exceeded(found, line):
    """What of its line a kernel of aot.py's does not keep, one text each."""
    local = max(0, found["local"] - int(line["local"] or 0))
    instructions, target = Counter(found["instructions"]), found["target"]
    if target.startswith("sm_"):
        launched = {"threads": found["threads"], "dynamic_shared": found["shared"]}
        kernel = sass.Kernel(found["kernel"], found["registers"], local, 0, 0, instructions)
        yield from sass.exceeded(kernel, line | launched, int(target.removeprefix("sm_")))
        return
    if local:
        yield f"{local} bytes of local memory"
    if found["registers"] > int(line["amd_registers"]):
        yield f"{found['registers']} vector registers, at most {line['amd_registers']}"
    yield from sass.missing(instructions, line["amd_instructions"], 0)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Of each stem that a test asks for, what aot.py finds, on its way: as many at a time as there are cores."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def found(stem):
        command = [sys.executable, FOLDER / "aot.py", stem, "--json", folder / stem]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads((folder / stem).read_text())

    asked = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {each.params["stem"]: pool.submit(found, each.params["stem"]) for each in asked if each}
        pool.shutdown(cancel_futures=True)


@pytest.mark.nested
@pytest.mark.parametrize("stem", aot_cases.CASES)
def test_kernels_keep_to_the_budget(compiled, stem):
    budget = [line for line in BUDGET if line["stem"] == stem]
    unkept, unused = [], list(budget)
    for found in compiled[stem].result():
        name = f"{found['target']} {found['kernel']} {found['case']}"
        lines = [x for x in budget if all(fnmatchcase(found[what], x[what]) for what in ("kernel", "case"))]
        assert len(lines) == 1, f"budget.csv has {len(lines)} lines for {name}; it needs one"
        unkept += [f"{name}: {text}" for text in exceeded(found, lines[0])]
        unused = [x for x in unused if x is not lines[0]]
    assert not unkept, "\n".join(unkept)
    assert not unused, f"budget.csv has lines without a kernel: {unused}"


def test_the_budget_notices():
    line = {"registers": "64", "blocks_per_sm": "90:5", "instructions": "LDG.128 HMMA|HGMMA@90 !HMMA@100", "local": ""}
    line |= {"amd_registers": "80", "amd_instructions": "load.128 MFMA !scratch.load.32"}
    given = {"kernel": "k", "target": "sm_90", "threads": 256, "registers": 48, "local": 0, "shared": 9216}
    kept = given | {"instructions": {"LDG.128": 2, "HGMMA": 1}}
    assert list(exceeded(kept, line)) == []
    assert list(exceeded(given | {"instructions": {"LDG": 2}, "local": 16, "shared": 120_000}, line)) == [
        "0 bytes spilled, 16 bytes of local memory",
        "1 blocks per SM, at least 5",
        "LDG.128 is missing",
        "HMMA|HGMMA is missing",
    ]
    amd = given | {"target": "gfx942", "registers": 81, "local": 4}
    assert list(exceeded(amd | {"instructions": {"load.64": 1, "scratch.load.32": 1}}, line)) == [
        "4 bytes of local memory",
        "81 vector registers, at most 80",
        "load.128 is missing",
        "MFMA is missing",
        "scratch.load.32 is there",
    ]
