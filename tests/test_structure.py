"""What holds the package together: imports run one way, and objects of different instruction sets share no symbol."""

import ast
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mutants
import pybind11
import pytest
import torch

import fastbert

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastbert.__file__).parent

# The rooms of the house, from the ground up: what stands in one may import from those before it.
ROOMS = {
    "ground": {
        "version",
        "files",
        "page",
        "extras",
        "counter_random",
        "signals",
        "lock",
        "tokenizer_files",
        "allocator",
        "capture",
        "_cpu",
        "_cuda",
    },
    "testing": {"testing"},
    "kernels": {"kernels"},
    "backends": {"backends"},
    "ops": {"ops"},
    "optim": {"optim"},
    "models": {"models", "patching"},  # patching: models that transformers wired, over the same ops
    "data": {"data"},
    "programs": {"pretrain", "prepare", "finetune", "distill", "embed", "fill", "attention_page", "bench"},
    "top": {"cli", "bert", "__init__", "__main__"},
}
ROOM = {name: room for room, names in ROOMS.items() for name in names}
MOST_ARROWS = 25


def imported(path):
    """First names under `fastbert` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastbert":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("fastbert."))


def test_kernels_import_torch_triton_and_each_other():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert set(imported(path)) <= {"kernels"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
            assert others <= {"torch", "triton", "fastbert"}, path


def test_imports_run_one_way_between_few_rooms():
    arrows = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            assert name in ROOM, f"{path.relative_to(PACKAGE)} imports {name}, which stands in no room: add it to ROOMS"
            if ROOM[name] != ROOM[own]:
                arrows.add((ROOM[own], ROOM[name]))
    order = list(ROOMS)
    upward = [arrow for arrow in arrows if order.index(arrow[0]) < order.index(arrow[1])]
    assert not upward, f"imports run upward: {upward}"
    assert len(arrows) <= MOST_ARROWS, f"{len(arrows)} arrows between the rooms: {sorted(arrows)}"


def written_lists():
    """Lists of names in brackets, in Python and in the structs of C++: where they stand and the names."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            elif isinstance(node, ast.ClassDef):
                names = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
            elif isinstance(node, ast.Call):
                names = [x.id for x in node.args if isinstance(x, ast.Name)] + [word.arg for word in node.keywords]
            elif isinstance(node, ast.Tuple):
                names = [x.id for x in node.elts if isinstance(x, ast.Name)]
            yield f"{path.name}:{getattr(node, 'lineno', 0)}", names
    for path in (ROOT / "csrc").glob("*.h"):
        for name, fields in re.findall(r"struct (\w+)[^{;]*\{(.*?)\n\};", path.read_text(), re.DOTALL):
            yield f"{path.name}: {name}", re.findall(r"\b(\w+)(?=[,;])", re.sub("//.*", "", fields))


def test_an_ops_arguments_stand_in_few_places():
    """The twin's signature, the backend, the struct, and one more: an argument is added there and nowhere else.

    Beside them kernels have parameters: in Triton they are named again where a kernel begins and where it is launched.
    """
    written, many = list(written_lists()), 0
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("fastbert::"):
            continue
        schema = getattr(torch.ops.fastbert, name.removeprefix("fastbert::")).default._schema
        arguments = {argument.name for argument in schema.arguments} - {"backend"}
        if len(arguments) < 7:
            continue
        places = [place for place, names in written if len(arguments & set(names)) >= 0.9 * len(arguments)]
        # Attention and hard attention have nearly the same arguments, and each its own places.
        others = {"attention.py", "hard_attention.py"} - {f"{name[10:].rpartition('_')[0]}.py"}
        if "attention" in name:
            places = [place for place in places if place.partition(":")[0] not in others]
        assert len(places) <= 4, f"{name}'s arguments are listed in {places}"
        many += 1
    assert many >= 5


def test_faults_name_what_stands_in_the_sources():
    """Those of tests/mutants.py; one that went stale would keep all of them from being planted."""
    for fault in mutants.FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, f"{fault.file}: {fault.old!r}"
        for pattern in fault.tests.split():
            assert list((ROOT / "tests").glob(pattern)), pattern


def test_kernels_know_nothing_of_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        assert "<torch" not in path.read_text() and "ATen" not in path.read_text(), path


@pytest.mark.nested
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    "stem",
    [
        "gelu",
        "layer_norm",
        "cross_entropy",
        "attention",
        "hard_attention",
        "attention_distillation",
        "lazy_adam",
        "lazy_adam_replay",
        "table",
    ],
)
def test_kernels_share_no_symbol_between_instruction_sets(stem, tmp_path):
    """A weak symbol compiled for AVX-512 could be linked into the code for an older processor and crash it there."""
    source, target = ROOT / f"csrc/cpu/{stem}.cpp", tmp_path / "kernel.o"
    flags = "-O1 -std=c++17 -fPIC -fopenmp -fno-exceptions -fno-rtti -mavx2 -mfma -mf16c -DFASTBERT_ISA=avx2"
    subprocess.run(["g++", *flags.split(), "-c", source, "-o", target], check=True)
    symbols = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line for line in symbols if line[17:18] in "VWvwu" and line[17:18]]
    assert not weak, weak
    defined = [line for line in symbols if line[17:18] in "TDBR"]
    assert defined and all("fastbert::avx2::" in line for line in defined), defined


WIDEST = "-mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16"


@pytest.mark.nested
@pytest.mark.parametrize("compiler", ["g++-11", "clang++-14", "aarch64-linux-gnu-g++"])
def test_oldest_compilers_and_another_processor(compiler):
    """Every kernel is read for the smallest and the largest instruction set, and both modules, without a warning."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    if compiler == "aarch64-linux-gnu-g++":
        sets = {"baseline": ""}
    elif platform.machine() in ("x86_64", "AMD64"):
        sets = {"sse2": "", "amx_bf16": WIDEST}
    else:
        pytest.skip("reads x86's instruction sets")
    flags = "-O3 -std=c++17 -fopenmp -fsyntax-only -Wall -Wextra -Werror -fno-math-errno -fno-exceptions -fno-rtti"
    running = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for name, options in sets.items():
            command = [compiler, *flags.split(), *options.split(), f"-DFASTBERT_ISA={name}", source]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    if "sse2" in sets:  # this processor's, whose Python.h is here
        includes = f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"
        command = [compiler, *["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"], *includes]
        for source, its in (("bindings_cpu.cpp", ()), ("bindings_cuda.cpp", ("-DFASTBERT_CUDA_ARCHS=75,80",))):
            each = [*command, *its, ROOT / "csrc" / source]
            running.append(subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    assert running
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said[-2000:]


def test_no_compiler_is_said_and_can_be_left_out(tmp_path):
    def build(**environment):
        return subprocess.run(
            [sys.executable, ROOT / "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
            cwd=ROOT, env={"PATH": str(tmp_path)} | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    refused = build()
    assert refused.returncode != 0 and "set FASTBERT_BUILD=0" in refused.stderr
    assert build(FASTBERT_BUILD="0").returncode == 0
    assert not list(tmp_path.rglob("*.so"))
