"""Planted bugs: which check names which, with its line; and which come out right by values alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from emulated import ORDERS, InOut, KernelError, Library, Output

SOURCE = Path(__file__).with_name("planted.cu")
X = torch.arange(1.0, 65)

BACKWARDS, SAME = X.flip(0), X
FIRST = {"missing_syncwarp": X[:32].sum(), "missing_atomic": X[:4].sum(), "missing_fence": X[:4].sum()}
FIRST["missing_acquire"] = X.sum()


def planted_line(bug):
    (line,) = [n for n, text in enumerate(SOURCE.read_text().splitlines(), 1) if text.endswith(f"// PLANTED {bug}")]
    return f"planted.cu:{line}"


def run(library, bug, order="forward", use=InOut):
    """y after the launch; in a value build the 64 floats after y may be overwritten."""
    y = torch.zeros(64) if library.trace else torch.zeros(128)[:64]
    library.run(bug, order=order, x=X.clone(), y=use(y), n=64)
    return y


def finding(library, bug, order="forward", use=InOut):
    with pytest.raises(KernelError) as raised:
        run(library, bug, order, use)
    return str(raised.value)


@pytest.fixture(scope="module")
def values(emulate):
    return emulate("planted.cu", False)


@pytest.fixture(scope="module")
def traced(emulate):
    return emulate("planted.cu", True)


# ---- bugs that any build names ----


@pytest.mark.parametrize(
    "bug, kind",
    [
        ("divergent_barrier", "divergent barrier: some threads of the block wait at {line}"),
        ("early_return", "early return: 16 of 64 threads have returned, the others wait at the barrier in {line}"),
        ("lane_outside_mask", "missing lane: __shfl_xor_sync in {line} is called by a lane that its mask leaves out"),
        ("misaligned_copy", "misaligned address: cp.async from global memory in {line} needs a multiple of 16"),
        ("failed_assertion", "assertion failed: static_cast<int>(threadIdx.x) != n - 1 in {line}"),
        ("copy_without_wait", "unfinished cp.async: a thread has returned without waiting for it"),
        ("too_many_threads", "launch limits: kernel too_many_threads asks for a block of (2048, 1, 1) threads"),
        ("too_much_shared_memory", "launch limits: kernel too_much_shared_memory asks for 233472 bytes"),
    ],
)
def test_named_by_every_build(values, traced, order, bug, kind):
    expected = kind.format(line=planted_line(bug) if "{line}" in kind else "")
    for library in (values, traced):
        text = finding(library, bug, order)
        assert text.startswith(expected) and f"kernel {bug}" in text


def test_half_a_warp_in_a_shuffle_of_a_whole_one(values):
    """Whether the other half has returned before or after decides between two names."""
    text = finding(values, "half_a_warp", "forward")
    assert text.startswith("deadlock: a thread waits for __shfl_xor_sync in planted.cu:12; 16 threads have returned")
    text = finding(values, "half_a_warp", "reverse")
    assert text.startswith("missing lane: __shfl_xor_sync in planted.cu:12 waits for lane 16, which has returned")
    assert text.endswith("block (0, 0, 0), thread (0, 0, 0) (warp 0, lane 0)")


# ---- bugs whose numbers are wrong, in one order at least; the trace names them in every order ----


@pytest.mark.parametrize(
    "bug, kind, right",
    [
        ("missing_syncthreads", "race in shared memory: write in ", BACKWARDS),
        ("weak_wait", "unfinished cp.async: {line} reads what no wait_for_copies covers yet", SAME),
        ("uninitialised_shared", "uninitialised shared memory: {line} reads it", SAME),
    ],
)
def test_seen_by_values_and_named_by_the_trace(values, traced, bug, kind, right):
    wrong = [order for order in ORDERS if not torch.equal(run(values, bug, order), right)]
    assert wrong
    for order in ORDERS:
        text = finding(traced, bug, order)
        assert text.startswith(kind.format(line=planted_line(bug))) and planted_line(bug) in text.splitlines()[0]


def test_a_lane_outside_the_mask_gives_nan(values):
    y = run(values, "shuffle_from_outside")
    assert torch.equal(y[:15], X[1:16]) and y[15].isnan()


# ---- bugs whose numbers are right in every order: the trace alone names them ----


@pytest.mark.parametrize(
    "bug, kind",
    [
        ("missing_syncwarp", "race in global memory: write in {line} by block 0 thread 0 and read in "),
        ("missing_atomic", "race in global memory: read in {line} by block "),
        ("missing_fence", "race in global memory: read in {line} by block "),
        ("missing_acquire", "race in global memory: read in {line} by block 0 thread "),
        ("off_by_one", "out of bounds: write of 4 bytes at byte 256 of y, which has 256, in {line}"),
        ("write_to_input", "write to an input: {line} writes x"),
        ("index_outside_array", "index out of bounds: of 'float [64]' in {line}"),
        ("accumulates_into_output", "uninitialised output: {line} reads y before it is written"),
    ],
)
def test_named_by_the_trace_alone(values, traced, order, bug, kind):
    y = run(values, bug, order)
    assert torch.equal(y[0], FIRST[bug]) if bug in FIRST else torch.equal(y, X)
    use = Output if bug == "accumulates_into_output" else InOut
    assert finding(traced, bug, order, use).startswith(kind.format(line=planted_line(bug)))


def test_a_misaligned_vector_is_named_by_the_trace(traced, order):
    """A value build reads it where the compiler chose instructions that take any address."""
    text = finding(traced, "misaligned_vector", order)
    assert text.startswith(f"misaligned address: 16-byte read in {planted_line('misaligned_vector')}, 4 bytes past")


# ---- addresses that nobody has: an error, not the end of the process ----


def test_faults_become_errors(values, traced):
    assert f"in {planted_line('null_address')}; kernel null_address" in finding(values, "null_address")
    assert finding(values, "null_address").startswith("invalid address: null")
    text = finding(traced, "null_address")
    assert text.startswith(f"out of bounds: write of 4 bytes far from every tensor, in {planted_line('null_address')}")
    line = planted_line("dynamic_overrun")
    assert finding(values, "dynamic_overrun").startswith(f"invalid address: memory that is nobody's in {line}")
    text = finding(traced, "dynamic_overrun")
    assert text.startswith(
        f"out of bounds: write of 4 bytes at byte 256 of dynamic shared memory, which has 256, in {line}"
    )


def test_a_kernel_without_end_becomes_an_error(values):
    """Block 0 waits for block 1, which comes after it; the other way round all goes well."""
    y = torch.zeros(64)
    said = r"^no end: the time limit has passed, .* kernel waiting_block, block \(0, 0, 0\)"
    with pytest.raises(KernelError, match=said):
        values.run("waiting_block", seconds=0.1, x=X, y=InOut(y), n=64)
    values.run("waiting_block", seconds=0.1, order="reverse", x=X, y=InOut(y), n=64)
    assert y[0] == 1


def test_a_library_works_after_an_error(values):
    finding(values, "null_address")
    finding(values, "divergent_barrier")
    assert torch.equal(run(values, "write_to_input"), X)


# ---- no false alarms, and speed ----


def test_right_synchronisation_is_no_finding(values, traced, order):
    for library in (values, traced):
        assert run(library, "handoff", order)[0] == X[:4].sum()
        assert run(library, "warp_handoff", order)[0] == X.sum()
        assert torch.equal(run(library, "strong_wait", order), X)


def test_bank_conflicts_and_scattered_reads_have_their_line(traced):
    run(traced, "bank_conflict")
    (conflict,) = [row for row in traced.accesses() if row.conflicts > 1]
    assert (conflict.line, conflict.memory, conflict.conflicts) == (planted_line("bank_conflict"), "shared", 32)
    run(traced, "uncoalesced")
    (scattered,) = [row for row in traced.accesses() if row.efficiency < 1]
    assert (scattered.line, scattered.memory, scattered.cost, scattered.ideal) == (
        planted_line("uncoalesced"),
        "x",
        8,
        1,
    )


def test_what_cannot_be_passed_is_refused(values):
    with pytest.raises(ValueError, match="CPU tensors"):
        values.run("handoff", x=torch.empty(4, device="meta"), y=X, n=4)


def test_the_example_of_the_page_is_right(emulate, tmp_path):
    """In a folder that has nothing but the files which the page names, by the command that it gives."""
    root = emulated.EMULATOR.parents[1]
    page = (root / "docs/emulator.md").read_text()
    taken = re.search(r"other projects can\ntake (.*?) as they are", page, re.DOTALL)[1]
    for name in re.findall(r"`(.*?)`", taken):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if name.endswith("/") else shutil.copy)(root / name, tmp_path / name)
    for name, language in (("scale.cu", "c++"), ("scale.py", "python")):
        (tmp_path / name).write_text(page.split(f"```{language}\n")[1].split("```")[0])
    environment = os.environ | {"PYTHONPATH": "tests/cuda"}
    done = subprocess.run([sys.executable, "scale.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = re.search(r"KernelError: (.*?)\n\n", page, re.DOTALL)[1]
    assert done.stderr.partition("KernelError: ")[2].split() == said.split(), done.stderr


def test_fibers_by_ucontext_do_the_same(emulate):
    """The way of processors without a switch of their own."""
    objects = [emulated.compile_object(SOURCE, emulated.KERNEL_FLAGS[False])]
    for source in emulated.EMULATOR.glob("*.cpp"):
        own = ["-DEMULATOR_UCONTEXT"] if source.name in ("scheduler.cpp", "fiber.cpp") else []
        if source.name not in emulated.TRACE_SOURCES:
            objects.append(emulated.compile_object(source, ["-O2", *own]))
    library = Library(emulated.link(SOURCE, objects), trace=False)
    assert torch.equal(run(library, "missing_syncthreads", "forward")[32:], BACKWARDS[32:])
    assert finding(library, "null_address").startswith("invalid address: null")
    assert run(library, "handoff", "shuffled1")[0] == X[:4].sum()
