"""What nvcc makes of a CUDA source, without a GPU: registers, spills, shared memory, occupancy, instructions.

    python tests/cuda/sass.py tests/cuda/demo.cu [--archs 80 90] [--threads 128] [--dynamic-shared 16384]

test_budget.py holds the kernels to budget.csv by it. Instructions need nvdisasm: of the toolkit, or
`pip install nvidia-cuda-nvdisasm`.
"""

import argparse
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_cache import built

ARCHS = (75, 80, 90, 100, 120)
WARP, REGISTER_UNIT, SHARED_UNIT, PARTITIONS = 32, 256, 128, 4  # of an SM; registers are given to warps in units


@dataclass
class Limits:
    """Of one SM; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that the system takes of each block's
    registers: int = 65536


LIMITS = {
    75: Limits(1024, 16, 64 << 10, 0),
    80: Limits(2048, 32, 164 << 10, 1024),
    90: Limits(2048, 32, 228 << 10, 1024),
    100: Limits(2048, 32, 228 << 10, 1024),
    120: Limits(1536, 24, 100 << 10, 1024),
}


@dataclass
class Kernel:
    name: str  # "matmul_kernel<__half>"
    registers: int  # of a thread
    stack: int  # bytes of local memory
    spills: int  # bytes stored
    shared: int  # bytes, static
    instructions: Counter | None  # "LDG.128": 3; None without nvdisasm


def nvdisasm() -> str | None:
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"))
    return str(wheels[0]) if wheels else shutil.which("nvdisasm")


def report(source: Path, arch: int) -> list[Kernel]:
    """The kernels of a source, by name."""
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", str(source)]
    cubin = built(source.resolve(), command, ".cubin")
    listing = instructions(cubin)
    pattern = (
        r"Compiling entry function '(\S+)'.*\n.*Function properties.*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores.*\n.*Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    found = re.findall(pattern, cubin.with_suffix(".log").read_text())
    names = short_names([entry for entry, *_ in found])
    kernels = [
        Kernel(name, int(registers), int(stack), int(spills), int(shared or 0), listing and listing[entry])
        for name, (entry, stack, spills, registers, shared) in zip(names, found, strict=True)
    ]
    return sorted(kernels, key=lambda kernel: kernel.name)


def short_names(mangled: list[str]) -> list[str]:
    """Without namespaces and parameters."""
    lines = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    names = (re.sub(r"\(anonymous namespace\)::|\bvoid (?=\w)", "", line) for line in lines)
    return [re.sub(r"\b(?:\w+::)+", "", name).split("(")[0] for name in names]


def instructions(cubin: Path) -> dict[str, Counter] | None:
    """By a kernel's mangled name: how often each instruction stands in it, loads and stores with their width."""
    if nvdisasm() is None:
        return None
    text = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = section.split(",")[0].strip('"')
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", section, re.MULTILINE)
        kernels[name] = Counter(map(with_width, found))
    return kernels


def with_width(instruction: str) -> str:
    """LDG.E.128.CONSTANT is "LDG.128", HMMA.16816.F32 "HMMA"."""
    name, *modifiers = instruction.split(".")
    return next((f"{name}.{width}" for width in ("128", "64") if width in modifiers), name)


def blocks_per_sm(kernel: Kernel, arch: int, threads: int, dynamic_shared: int) -> int:
    """How many blocks of so many threads an SM holds at once."""
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    registers_of_warp = -(-kernel.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = limits.registers // PARTITIONS // registers_of_warp * PARTITIONS
    shared = -(-(kernel.shared + dynamic_shared + limits.reserved) // SHARED_UNIT) * SHARED_UNIT
    return min(
        limits.threads // (warps * WARP),
        limits.blocks,
        warps_by_registers // warps,
        limits.shared // shared if shared else limits.blocks,
    )


def exceeded(kernel: Kernel, line: dict[str, str], arch: int) -> Iterator[str]:
    """What of a line of the budget a kernel does not keep, one text each."""
    least = dict(part.split(":") for part in line["blocks_per_sm"].split())
    blocks = blocks_per_sm(kernel, arch, int(line["threads"]), int(line["dynamic_shared"]))
    if kernel.spills or kernel.stack:
        yield f"{kernel.spills} bytes spilled, {kernel.stack} bytes of local memory"
    if kernel.registers > int(line["registers"]):
        yield f"{kernel.registers} registers, at most {line['registers']}"
    if blocks < int(least[str(arch)]):
        yield f"{blocks} blocks per SM, at least {least[str(arch)]}"
    yield from missing(kernel.instructions, line["instructions"], arch)


def missing(instructions: Counter | None, wanted: str, arch: int) -> Iterator[str]:
    """Which of the instructions "LDG.128 HMMA|HGMMA@80 !CALL" are not there, or are though they must not be."""
    for each in wanted.split() if instructions is not None else []:
        name, _, since = each.partition("@")
        is_there = any(one in instructions for one in name.lstrip("!").split("|"))
        if arch >= int(since or 0) and is_there == name.startswith("!"):
            yield f"{name.lstrip('!')} {'is there' if name.startswith('!') else 'is missing'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--threads", type=int, default=128)
    parser.add_argument("--dynamic-shared", type=int, default=0)
    options = parser.parse_args()
    for arch in options.archs:
        for kernel in report(options.source, arch):
            blocks = blocks_per_sm(kernel, arch, options.threads, options.dynamic_shared)
            occupancy = blocks * options.threads / LIMITS[arch].threads
            print(
                f"sm_{arch} {kernel.name}: {kernel.registers} registers, {kernel.spills} bytes spilled, "
                f"{kernel.shared} + {options.dynamic_shared} bytes of shared memory; with {options.threads} threads "
                f"{blocks} blocks per SM, {occupancy:.0%}"
            )
            if kernel.instructions is not None:
                print("    " + " ".join(f"{name}:{n}" for name, n in kernel.instructions.most_common()))


if __name__ == "__main__":
    main()
