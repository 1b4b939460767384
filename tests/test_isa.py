"""Every instruction set this machine has is tested, not only the best.

The op tests visit each in turn within one process, through the fixture `backend`: that they do is held here. A whole
model runs once per lower instruction set in a process of its own, forced by FASTBERT_CPU_ISA as a user would.
"""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import native

TESTS = Path(__file__).parent
OPS = ("gelu", "layer_norm", "cross_entropy", "attention", "lazy_adam", "lazy_adam_replay")
ISAS = native.module.instruction_sets() if native.module else []


def pytest_process(*arguments, **environment):
    """A pytest of its own; FASTBERT_BACKEND would take the choice from it."""
    environment = {**os.environ, "FASTBERT_BACKEND": "", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not ISAS, reason="the C++ module is not built")
def test_every_op_is_tested_on_every_instruction_set():
    listing = pytest_process("--collect-only", *(TESTS / f"test_{op}.py" for op in OPS))
    found = collections.Counter(re.findall(r"test_(\w+)\.py::\w+\[[^\]]*cpu:(\w+)", listing))
    for op in OPS:
        counts = {isa: found[op, isa] for isa in ISAS}
        assert len(set(counts.values())) == 1 and counts[ISAS[0]] >= 10, (op, counts)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_a_model_on_a_lower_instruction_set(isa):
    """Modules and the whole BERT: 20 steps with the loss curve of a plain PyTorch BERT, dropout, bfloat16, padding.

    What compiles is left out: it takes ten times as long and calls the same kernels.
    """
    selection = "(cpu or backend) and not compiles"
    output = pytest_process("-k", selection, TESTS / "test_nn.py", TESTS / "test_bert.py", FASTBERT_CPU_ISA=isa)
    assert int(re.search(r"(\d+) passed", output)[1]) >= 12, output[-1000:]
