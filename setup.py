"""Builds `fastbert._cpu`: every kernel once per instruction set, linked into one module that picks at load time.

`csrc/` includes nothing of torch, so the build needs no torch and one build serves every torch version.
FASTBERT_BUILD=0 leaves the module out; CXX names another compiler; FASTBERT_SANITIZE=1 builds the kernels with
AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize` alone; FASTBERT_EMULATE=1 builds those for AVX-512
in AVX2's instructions, for `make emulate` and its test.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = (
    "gelu", "layer_norm", "dropout", "cross_entropy", "attention", "linear", "transpose", "lazy_adam",
    "lazy_adam_replay", "table",
)  # fmt: skip

AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
AVX512_BF16 = f"{AVX512} -mavx512bf16"
AMX_BF16 = f"{AVX512_BF16} -mamx-tile -mamx-bf16"
X86_INSTRUCTION_SETS = {
    "sse2": "", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx_bf16": AMX_BF16,
}  # fmt: skip
INSTRUCTION_SETS = X86_INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}

FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra"
KERNEL_FLAGS = "-fno-math-errno -fno-exceptions -fno-rtti"
# GCC interleaves independent chains of instructions only if told to. These two take 5 to 25 % less time by it with
# AVX2, no other kernel does.
STEM_FLAGS = dict.fromkeys(("gelu", "cross_entropy"), "-fschedule-insns -fsched-pressure")
LINK_FLAGS = "-s"
if os.environ.get("FASTBERT_SANITIZE") == "1":
    LINK_FLAGS = "-fsanitize=address,undefined"
    KERNEL_FLAGS += f" -O1 -g {LINK_FLAGS} -fno-sanitize-recover=all"
if os.environ.get("FASTBERT_EMULATE") == "1":
    FLAGS += " -O1 -fexpensive-optimizations -DFASTBERT_EMULATE"  # quick to compile, and still with FMA
    EMULATED = f"{AVX2} -Wno-psabi -include {ROOT / 'tests/avx512_emulator.h'}"
    INSTRUCTION_SETS = {"avx512": EMULATED, "avx512_bf16": f"{EMULATED} -DFASTBERT_EMULATE_BF16"}


class BuildKernels(build_ext):
    def build_extension(self, extension: Extension) -> None:
        compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            sys.exit(
                "fastbert-kernels needs a C++17 compiler and found neither $CXX nor g++ nor clang++. Install one "
                "(Debian and Ubuntu: apt-get install g++), or set FASTBERT_BUILD=0 to install without the C++ kernels: "
                "then everything runs on the pure PyTorch backend, slower."
            )
        import ninja

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_plan(compiler, target))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


def build_plan(compiler: str, target: Path) -> str:
    """The build.ninja that compiles `csrc/` into `target`."""
    import pybind11

    include = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    plan = [
        f"compiler = {compiler}",
        "rule compile",
        "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $compiler -shared -fopenmp {LINK_FLAGS} $in -o $out",
        "  description = link $out",
        f"build bindings.o: compile {ROOT / 'csrc/bindings_cpu.cpp'}",
        f"  flags = {FLAGS} {include}",
    ]
    objects = ["bindings.o"]
    stem_flags = {} if "clang" in Path(compiler).name else STEM_FLAGS  # clang always does, and knows no such flag
    for name, flags in INSTRUCTION_SETS.items():
        for stem in KERNELS:
            objects.append(f"{stem}.{name}.o")
            plan += [
                f"build {objects[-1]}: compile {ROOT / 'csrc/cpu' / stem}.cpp",
                f"  flags = {FLAGS} {KERNEL_FLAGS} {stem_flags.get(stem, '')} {flags} -DFASTBERT_ISA={name}",
            ]
    return "\n".join([*plan, f"build {target}: link {' '.join(objects)}", ""])


setup(
    packages=[*find_packages(include=["fastbert", "fastbert.*"]), "fastbert.kernels"],
    py_modules=["fastbert_main"],
    package_dir={"fastbert.kernels": "kernels"},
    package_data={"fastbert": ["py.typed"]},
    ext_modules=[] if os.environ.get("FASTBERT_BUILD") == "0" else [Extension("fastbert._cpu", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
