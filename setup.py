"""Builds `fastbert._cpu`: every kernel once per instruction set, linked into one module that picks at load time; and
where there is an nvcc, `fastbert._cuda`: the kernels for NVIDIA GPUs.

`csrc/` includes nothing of torch, so the build needs no torch and one build serves every torch version.
FASTBERT_BUILD=0 leaves both modules out; CXX names another compiler; FASTBERT_SANITIZE=1 builds the kernels with
AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize` alone; FASTBERT_EMULATE=1 builds those for AVX-512
in AVX2's instructions, for `make emulate` and its test.

nvcc is that of CUDA_HOME, else of PATH, of /usr/local/cuda, or of the wheels nvidia-cuda-nvcc and nvidia-cuda-cccl in
this environment. FASTBERT_CUDA=0 leaves `_cuda` out, 1 demands it; FASTBERT_CUDA_ARCHS="80 90" compiles for these GPUs
alone, which takes less time.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = (
    "gelu", "layer_norm", "dropout", "embedding_norm", "cross_entropy", "attention", "hard_attention",
    "attention_distillation", "linear", "transpose", "lazy_adam", "lazy_adam_replay", "table",
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

CUDA_STEMS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
CUDA_ARCHS = (75, 80, 90, 100, 120)  # GPUs of the same generation and later run them: 80 serves 86 and 89
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


if int(setuptools.__version__.split(".")[0]) < 77:  # pip sees to it, by pyproject.toml; setup.py alone does not
    sys.exit(
        f"fastbert-kernels needs setuptools 77 or later, got {setuptools.__version__}: pip install 'setuptools>=77'"
    )


class BuildKernels(build_ext):
    def build_extension(self, extension: Extension) -> None:
        compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            sys.exit(
                "fastbert-kernels needs a C++17 compiler and found neither $CXX nor g++ nor clang++. Install one "
                "(Debian and Ubuntu: apt-get install g++), or set FASTBERT_BUILD=0 to install without the C++ kernels: "
                "then everything runs on the pure PyTorch backend, slower."
            )
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        is_cuda = extension.name == "fastbert._cuda"
        folder = Path(self.build_temp).resolve() / ("cuda" if is_cuda else ".")
        folder.mkdir(parents=True, exist_ok=True)
        plan = cuda_plan(compiler, target) if is_cuda else cpu_plan(compiler, target)
        (folder / "build.ninja").write_text("\n".join([*rules(compiler), *plan, ""]))
        done = subprocess.run([find_ninja(), "-C", folder], check=False)
        if done.returncode != 0:
            sys.exit(
                f"{extension.name} could not be compiled; the compiler's own words stand above. "
                + (CUDA_ADVICE if is_cuda else "FASTBERT_BUILD=0 installs without the C++ kernels.")
            )


CUDA_ADVICE = (
    "nvcc takes only some versions of the host compiler ($CXX names another) and knows only some GPUs "
    "(FASTBERT_CUDA_ARCHS=90 compiles for one). FASTBERT_CUDA=0 installs without the kernels for NVIDIA GPUs."
)


def rules(compiler: str) -> list[str]:
    """How ninja compiles and links C++."""
    return [
        f"compiler = {compiler}",
        "rule compile",
        "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def python_include() -> str:
    return f"-I{pybind11_include()} -I{sysconfig.get_path('include')}"


def pybind11_include() -> str:
    """pybind11's own headers, or those that torch carries: where pip builds there are the former, always."""
    if find_spec("pybind11"):
        return import_module("pybind11").get_include()
    torch = find_spec("torch")
    if torch is None or not (include := Path(torch.origin).parent / "include/pybind11").exists():
        sys.exit("fastbert-kernels is compiled with pybind11's headers, which are not here: pip install pybind11")
    return str(include.parent)


def find_ninja() -> str:
    if find_spec("ninja"):
        return str(Path(import_module("ninja").BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        sys.exit("fastbert-kernels is compiled by ninja, which is not here: pip install ninja")
    return found


# ---- fastbert._cpu -------------------------------------------------------------------------------------------------


def cpu_plan(compiler: str, target: Path) -> list[str]:
    """What ninja has to do for `_cpu`."""
    plan = [
        "rule link",
        f"  command = $compiler -shared -fopenmp {LINK_FLAGS} $in -o $out",
        "  description = link $out",
        f"build bindings.o: compile {ROOT / 'csrc/bindings_cpu.cpp'}",
        f"  flags = {FLAGS} {python_include()}",
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
    return [*plan, f"build {target}: link {' '.join(objects)}"]


# ---- fastbert._cuda ------------------------------------------------------------------------------------------------


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of $PATH, of /usr/local/cuda, or of NVIDIA's wheels; None where there is none."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin/nvcc"
        if not nvcc.exists():
            sys.exit(f"CUDA_HOME={home} has no bin/nvcc: set it to a CUDA toolkit, or unset it to look elsewhere.")
        return nvcc
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    places = [shutil.which("nvcc"), Path("/usr/local/cuda/bin/nvcc"), *reversed(wheels)]
    return next((Path(place) for place in places if place and Path(place).exists()), None)


def cuda_wanted() -> bool:
    """Whether `_cuda` is built: where there is an nvcc, unless FASTBERT_CUDA says otherwise."""
    choice = os.environ.get("FASTBERT_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(
            f"FASTBERT_CUDA must be 0 (without the kernels for NVIDIA GPUs) or 1 (not without them), got {choice!r}."
        )
    if choice == "0":
        return False
    found = find_nvcc() is not None
    if choice == "1" and not found:
        sys.exit(
            "FASTBERT_CUDA=1 demands the kernels for NVIDIA GPUs, and there is no nvcc: install a CUDA toolkit of "
            "version 12 or later and set CUDA_HOME to it, or pip install nvidia-cuda-nvcc nvidia-cuda-cccl."
        )
    if not found:
        print("no nvcc was found: fastbert._cuda, the kernels for NVIDIA GPUs, is left out")
    return found


@cache
def known_archs() -> list[int]:
    """All GPUs that nvcc compiles for, ascending."""
    nvcc = find_nvcc()
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = sorted({int(word) for word in re.findall(r"compute_(\d+)\b", said.stdout)})
    if not known:
        sys.exit(
            f"{nvcc} --list-gpu-arch names no GPU and says {said.stdout + said.stderr!r}: nvcc 12 or later is needed."
        )
    return known


def cuda_archs() -> list[int]:
    """The GPUs to compile for, ascending: FASTBERT_CUDA_ARCHS, or those of CUDA_ARCHS that nvcc knows."""
    known = known_archs()
    asked = os.environ.get("FASTBERT_CUDA_ARCHS", "").replace(",", " ").split()
    try:
        archs = sorted({int(each) for each in asked})
    except ValueError:
        archs = []
    if asked and (not archs or archs[0] < CUDA_ARCHS[0] or not set(archs) <= set(known)):
        usable = [arch for arch in known if arch >= CUDA_ARCHS[0]]
        sys.exit(
            f"FASTBERT_CUDA_ARCHS={' '.join(asked)}: expected numbers such as '80 90', for sm_80 and sm_90, out of "
            f"those that {find_nvcc()} compiles for and the kernels run on: {', '.join(map(str, usable))}."
        )
    return archs or [arch for arch in CUDA_ARCHS if arch in known]


def cuda_plan(compiler: str, target: Path) -> list[str]:
    """What ninja has to do for `_cuda`: nvcc compiles kernels and links, with CUDA's runtime in the module itself."""
    nvcc, archs = find_nvcc(), cuda_archs()
    generate = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    generate += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"  # for GPUs to come
    if known_archs()[0] >= 75:  # CUDA 13: a third of the size. What CUDA 12 packs so asks for a newer driver, 550
        generate += " --compress-mode=size"
    at_once = min(len(archs) + 1, max(1, (os.cpu_count() or 1) // len(CUDA_STEMS)))  # beside ninja's own
    plan = [
        f"nvcc = {nvcc} -ccbin {compiler}",
        "rule compile_cuda",
        f"  command = $nvcc {CUDA_FLAGS} {generate} --threads {at_once} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
        "rule link",
        f"  command = $nvcc -shared --cudart static -L{nvcc.resolve().parents[1] / 'lib'} -Xlinker -s $in -o $out",
        "  description = link $out",
        f"build bindings_cuda.o: compile {ROOT / 'csrc/bindings_cuda.cpp'}",
        f"  flags = {FLAGS} {python_include()} -DFASTBERT_CUDA_ARCHS={','.join(map(str, archs))}",
    ]
    objects = ["bindings_cuda.o"]
    for stem in CUDA_STEMS:
        objects.append(f"{stem}.cuda.o")
        plan.append(f"build {objects[-1]}: compile_cuda {ROOT / 'csrc/cuda' / stem}.cu")
    return [*plan, f"build {target}: link {' '.join(objects)}"]


def extensions() -> list[Extension]:
    if os.environ.get("FASTBERT_BUILD") == "0":
        return []
    names = ["fastbert._cpu"]
    if "1" not in (os.environ.get("FASTBERT_SANITIZE"), os.environ.get("FASTBERT_EMULATE")) and cuda_wanted():
        cuda_archs()  # what it refuses is said before anything is compiled
        names.append("fastbert._cuda")
    return [Extension(name, sources=[]) for name in names]


setup(
    # fastbert/kernels is a link to kernels/, for checkouts that are not installed.
    packages=[*find_packages(include=["fastbert", "fastbert.*"], exclude=["fastbert.kernels"]), "fastbert.kernels"],
    py_modules=["fastbert_main"],
    package_dir={"fastbert.kernels": "kernels"},
    package_data={"fastbert": ["py.typed", "attention_page.html", "bench/report.html"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
