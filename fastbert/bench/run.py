"""What `fastbert bench` does: judge and time every case, write a table and a page, and say what changed."""

import contextlib
import csv
import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from fastbert import files
from fastbert.allocator import keep_memory
from fastbert.bench import peers, rates, report, results
from fastbert.bench.machine import clock, machine
from fastbert.bench.measure import Row, Taken
from fastbert.bench.plan import plan, without_slow_products
from fastbert.bench.settings import SITTINGS, BenchConfig
from fastbert.version import __version__

TABLE, PAGE = "bench.csv", "bench.html"
CEILINGS = {"quick": (1 << 28, 1024), "cpu": (1 << 29, 2048), "cuda": (1 << 32, 8192)}  # bytes of a copy; W of W x W
LONG = 120  # seconds that the timed cases of an op take, after which they have no other sitting


def bench(config: BenchConfig) -> Path:
    """Measures, prints and writes; returns the page's path.

    Raises:
        ValueError, OSError: a setting that does not hold, or a file that cannot be read or written.
        VerificationError: an op of ours is wrong; what was measured before it is in bench.csv.
    """
    config.check()
    old = None if config.compare is None else results.read(config.compare)  # before minutes are spent
    missing = _missing(config)
    among = {name for name in (*peers.PACKAGES, peers.COMPILED) if name not in missing}
    busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if busy > cores / 2:
        print(f"other programs keep this machine busy (load {busy:.1f}, {cores} cores): ratios will be less exact")
    with files.naming(config.output):  # as above
        config.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.output).close()
    keep_memory()
    torch.manual_seed(0)
    taken: dict[tuple[str, ...], Taken] = {}
    with _on(config.device):
        clocks = [clock()]
        ceilings = rates.measure(config.dtype, *CEILINGS["quick" if config.quick else config.device])
        ways = plan(config, among, missing)
        for sitting in range(SITTINGS):
            if not ways:
                break
            try:
                for way in tqdm(list(ways), f"sitting {sitting + 1} of {SITTINGS}", unit="op", disable=None):
                    cases = way[1]()
                    begun = time.perf_counter()
                    for case in cases:
                        key = case.op, case.shape, case.dtype, case.direction, case.axis
                        taken.setdefault(key, Taken(case)).sit(case, config.rounds, config.limit)
                    if time.perf_counter() - begun > LONG:
                        ways.remove(way)
            finally:  # also of a sitting that Ctrl-C ends
                rows, text = _write_table(config.output, taken.values(), ceilings)
        clocks.append(clock())
        about = {**machine(), "fastbert": __version__, "clock before and after": " / ".join(clocks)}
    print(report.table(rows))
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    compared = None
    if old is not None:
        compared = results.compare(old, csv.DictReader(io.StringIO(text)))
        print(report.said(compared))
    page = report.page(rows, ceilings, about, missing, compared)
    files.write(config.output, {PAGE: page.encode()})
    print(f"written: {config.output / TABLE}\nwritten: {config.output / PAGE}")
    return config.output / PAGE


def _write_table(folder: Path, taken: Iterable[Taken], ceilings: rates.Rates) -> tuple[list[Row], str]:
    """What was measured so far, and the same as text; a file of it, unless it is nothing."""
    rows = [row for its in taken for row in its.rows(ceilings)]
    text = results.csv_text([row | {"fastbert": __version__} for row in rows])
    if rows:
        files.write(folder, {TABLE: text.encode()})
    return rows, text


def _missing(config: BenchConfig) -> dict[str, str]:
    """Why peers do not take part."""
    why = {name: peers.why_not(name, config.device) for name in peers.PACKAGES}
    why[peers.COMPILED] = peers.why_not_compiled(config.compile and not config.quick)
    if without_slow_products(config):
        why["linear layers and steps in 16 bits"] = (
            "this processor has no bfloat16 products, and PyTorch's own take minutes: left out by --quick"
        )
    return {name: reason for name, reason in why.items() if reason}


@contextlib.contextmanager
def _on(device: str) -> Iterator[None]:
    """Tensors are made on this device; on a CPU nothing is changed, as torch's way of changing it takes time."""
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield
