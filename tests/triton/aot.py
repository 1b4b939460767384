"""What Triton makes of the kernels for GPUs that are not here: registers, local memory, occupancy, instructions.

    python tests/triton/aot.py [gelu cross_entropy ...] [--targets sm_90 gfx942] [--kernel gelu_backward*] [--all]

Launchers are called with tensors of the CPU; instead of being launched each kernel is compiled, for just the arguments
and the options that it would be launched with. test_budget.py holds the results to budget.csv. Compiled kernels are
kept in build/triton as long as Triton and their sources stay the same. It needs no driver, and a process of its own,
without TRITON_INTERPRET. What is called for each kernel is in aot_cases.py.
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/cuda"))
CACHE = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton")))

import aot_cases  # noqa: E402
import sass  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
READERS = hashlib.sha256(Path(__file__).read_bytes() + Path(sass.__file__).read_bytes()).hexdigest()[:8]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Compiled:
    """A kernel for one target. Of an AMD GPU registers are vector registers, the accumulators' among them."""

    stem: str
    case: str  # "bfloat16 3072 none": for which the kernel was first launched so
    kernel: str
    target: str
    threads: int  # of a program
    registers: int  # of a thread
    local: int  # bytes of local memory of a thread: what was spilled, and what is indexed
    shared: int  # bytes, static and of the launch
    instructions: dict[str, int]  # "LDG.128": 3; of an AMD GPU "load.128" and "MFMA" for all of their kind

    def blocks_per_sm(self) -> int | None:
        if self.target.startswith("gfx"):
            return None
        return sass.blocks_per_sm(self.as_cuda(), self.arch, self.threads, self.shared)

    def as_cuda(self) -> sass.Kernel:
        """As of a CUDA source, whose budget it is held to; shared memory is the launch's."""
        return sass.Kernel(self.kernel, self.registers, self.local, 0, 0, Counter(self.instructions))

    @property
    def arch(self) -> int:
        return int(self.target.removeprefix("sm_"))


class Driver:
    """In place of Triton's, of a GPU that is not there."""

    def __init__(self, target: str) -> None:
        self._device = list(TARGETS).index(target)
        self._target = TARGETS[target]

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class Compiler:
    """In place of `fastbert.kernels.launch.launch`."""

    def __init__(self) -> None:
        self.stem = self.target = self.case = ""
        self.is_complete = False  # every form is there, and no other is to be asked for
        self.found: dict[tuple[str, str], Compiled] = {}  # by target and by what Triton calls the compiled form

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if self.target.startswith("gfx"):
            constants.pop("maxnreg", None)  # as launch does
        form = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **constants)
        if (self.target, form.hash) in self.found:
            return
        name = kernel.fn.__name__
        if self.is_complete:
            raise AssertionError(f"{name} of {self.case} is compiled anew for another number of rows")
        threads = form.metadata.num_warps * TARGETS[self.target].warp_size
        its = read(form, self.target)
        self.found[self.target, form.hash] = Compiled(self.stem, self.case, name, self.target, threads, *its)

    def name(self, *case: object) -> None:
        """What follows is launched for this case."""
        self.case = " ".join(str(each).removeprefix("torch.") for each in case)

    def call(self, functions: ModuleType, target: str) -> None:
        """Compiles what a stem's launchers start."""
        self.target = target
        triton.runtime.driver.set_active(Driver(target))
        if hasattr(functions, "target_of"):  # by which attention chooses its plans
            functions.target_of = lambda device: "amd" if target.startswith("gfx") else target
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for self.is_complete, rows in enumerate(aot_cases.ROWS):
                aot_cases.CASES[self.stem](functions, dtype, rows, functools.partial(self.name, dtype))


def read(form: Any, target: str) -> tuple[int, int, int, dict[str, int]]:
    """Registers, local memory, shared memory and instructions; kept beside what was compiled."""
    kept = CACHE / f"{form.hash}.{READERS}.json"
    if not kept.exists():
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps((of_amd if target.startswith("gfx") else of_nvidia)(form)))
        unfinished.replace(kept)
    return tuple(json.loads(kept.read_text()))


def of_nvidia(form: Any) -> tuple[int, int, int, dict[str, int]]:
    """By the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(form.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, local = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        (instructions,) = sass.instructions(Path(file.name)).values()
    return int(registers), int(local), form.metadata.shared, dict(instructions)


def of_amd(form: Any) -> tuple[int, int, int, dict[str, int]]:
    text = form.asm["amdgcn"]
    number = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    names = map(amd_name, re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    local = number["private_segment_fixed_size"]
    return number["vgpr_count"], local, form.metadata.shared, dict(Counter(name for name in names if name))


def amd_name(instruction: str) -> str:
    """global_load_dwordx4 and buffer_load_dwordx4 are "load.128", v_mfma_f32_32x32x16_bf16 "MFMA"."""
    if instruction.startswith("v_mfma"):
        return "MFMA"
    found = re.fullmatch(r"(global|buffer|flat|scratch)_(load|store|atomic)_(\w+)", instruction)
    if not found:
        return instruction
    space, what, size = found.groups()
    bits = next((bits for end, bits in (("x4", 128), ("x2", 64), ("x3", 96), ("dword", 32)) if size.endswith(end)), 16)
    return f"{'scratch.' if space == 'scratch' else ''}{what}.{bits}"


def compiled(stems: list[str], targets: list[str]) -> Iterator[Compiled]:
    """Every kernel that the launchers of these stems start, for every case."""
    compiler = Compiler()
    sys.modules["fastbert.kernels.launch"] = ModuleType("launch")
    sys.modules["fastbert.kernels.launch"].launch = compiler.launch
    for compiler.stem in stems:
        functions = importlib.import_module(f"fastbert.kernels.{compiler.stem}")
        for target in targets:
            compiler.found.clear()
            compiler.call(functions, target)
            yield from compiler.found.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", nargs="*", metavar="stem", help=f"of {', '.join(aot_cases.CASES)}; all, if none")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", default="*", help="those whose name matches; only gelu_*")
    parser.add_argument("--all", action="store_true", help="every instruction, not only memory, matrices and calls")
    parser.add_argument("--json", type=Path, help="write this file instead")
    options = parser.parse_args()
    found = compiled(options.stems or list(aot_cases.CASES), options.targets)
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found]))
        return
    shown = r".*" if options.all else r"(LD|ST|scratch|load|store|atomic|RED|ATOM|\w*MMA|MFMA|CALL|MUFU).*"
    for each in found:
        if not fnmatchcase(each.kernel, options.kernel):
            continue
        blocks = each.blocks_per_sm()
        print(
            f"{each.target:7}{each.kernel:34}{each.case:30}{each.threads:4} threads {each.registers:4} registers "
            f"{each.local:4} local {each.shared:6} shared" + (f" {blocks:3} per SM" if blocks else ""),
            *(f"{k}:{n}" for k, n in sorted(each.instructions.items(), key=lambda it: -it[1]) if re.match(shown, k)),
            f"of {sum(each.instructions.values())}",
            flush=True,
        )


if __name__ == "__main__":
    main()
