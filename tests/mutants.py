"""Plants faults into a copy of the sources, one at a time, and counts those that the tests find.

    python tests/mutants.py [--tests FOLDER ...] [--build FOLDER] [--only WORD]

A fault is a file, a text that occurs in it once, what stands there instead, and the test files that should find it. For
a fault of a kernel the objects of one instruction set, this machine's best, are compiled from the copy and linked with
the others of `--build`, where this checkout or another of the same sources was built. Several folders of tests are
compared on the same faults. Before all, the tests named must pass on the copy without a fault.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests/cuda"))

from build_cache import included  # noqa: E402

OTHERS = "not sse2 and not (avx2 and cpu) and not (avx512- or avx512]) and not baseline"  # instruction sets


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # patterns in the folder of tests, with blanks between


def kernel(name: str, tests: str, *faults: tuple[str, str]) -> list[Fault]:
    return [Fault(f"csrc/cpu/{name}", old, new, tests) for old, new in faults]


def python(name: str, tests: str, *faults: tuple[str, str]) -> list[Fault]:
    return [Fault(f"fastbert/{name}.py", old, new, tests) for old, new in faults]


FAULTS = [
    *kernel(
        "gelu.cpp", "ops/test_gelu.py ops/test_shapes.py",
        ("q = q * s + 253.97015f;", "q = q * s + 253.9f;"),  # a coefficient
        ("return u > 0.f ? 1.f - slope : slope;", "return 1.f - slope;"),  # left of 0
        ("      sum += d;\n", ""),  # a tail's or a vector's share of dbias
        ("          min(kColumns, grid.columns - first)};", "          min(kColumns - 8, grid.columns - first)};"),
        ("exact_end = is_short ? kExactEndShort : kExactEnd", "exact_end = is_short ? kExactEndShort : 6.f"),
    ),
    *kernel(
        "layer_norm.cpp", "ops/test_layer_norm.py ops/test_shapes.py",
        ("d = rstd * (g - mean_g - h * mean_gh);", "d = rstd * (g - h * mean_gh);"),
        ("total += sum_block(z + first, n);", "total = sum_block(z + first, n);"),
        ("if (residual) v += lanes.load(residual + j);", "if (residual) v = lanes.load(residual + j);"),
        ("d = drop(kept, k, d * scale);", "d = drop(kept, k, d);"),
        (": columns <= kRowDrawn ? dropout.kept(0, first)", ": columns <= 2 * kRowDrawn ? dropout.kept(0, first)"),
    ),
    *kernel(
        "embedding_norm.cpp", "ops/test_embedding_norm.py",
        ("if (task) v += lanes.load(task + j);", ""),
        ("if (kept) v = drop(kept, k, v * scale);", "if (kept) v = drop(kept, k, v);"),
        ("for (int i = 0; i < 4; ++i)", "for (int i = 0; i < 1; ++i)"),  # ids that are not looked at
    ),
    *kernel(
        "column_sums.h", "ops/test_gelu.py ops/test_layer_norm.py",
        ("for (int64_t chunk = 0; chunk < chunks; ++chunk)", "for (int64_t chunk = 0; chunk < min(64, chunks) - (chunks > 1); ++chunk)"),
    ),
    *kernel(
        "dropout.h", "ops/test_philox.py ops/test_layer_norm.py ops/test_attention.py",
        ("k0 += kPhiloxW0, k1 += kPhiloxW1)", "k0 += kPhiloxW0, k1 += kPhiloxW0)"),  # a key
        ("place[i] = i / 2 + i % 2 * (width / 2)", "place[i] = i"),  # lanes out of order
        ("set1_epi8(static_cast<char>(t - 1))", "set1_epi8(static_cast<char>(t))"),
        ("const int64_t start = first / kRowDrawn * kRowDrawn;", "const int64_t start = 0;"),
    ),
    *kernel(
        "cross_entropy.cpp", "ops/test_cross_entropy.py ops/test_shapes.py",
        ("softmax.sum *= exp(splat(softmax.maximum - top))[0];", ""),
        ("softmax.maximum == lowest ? 0.f : softmax.maximum;", "softmax.maximum;"),
        ("memset(dx + columns, 0, (p.stride - columns) * sizeof(T));", "memset(dx + columns, 0, (p.stride - columns) / 2 * sizeof(T));"),
        ("* scale - dloss, 1);", "* scale - 1.f, 1);"),
    ),
    *kernel(
        "attention_softmax.h", "ops/test_attention.py ops/test_shapes.py",
        ("const bool same = before == now || before == -__builtin_inff();", "const bool same = true;"),
        ("ds[i] = seen.pick(q.visible, j, full * (dw - q.delta), 0.f);", "ds[i] = seen.pick(q.visible, j, full * dw, 0.f);"),
    ),
    *kernel(
        "attention_visible.h", "ops/test_attention.py ops/test_attention_visible.py ops/test_shapes.py",
        ("min(keys - 1, query + p.window_right - key0)", "min(keys - 1, query + p.window_right - key0 + 1)"),
    ),
    *kernel(
        "attention.cpp", "ops/test_attention.py ops/test_attention_visible.py ops/test_shapes.py",
        ("mask.is_given() || block.key > max(0, block.query - p.window_left) / kKeys * kKeys;", "mask.is_given() || block.key > 0;"),
        ("dropout.draw(static_cast<uint32_t>(p.cu_seqlens[task.sequence] + query), from,", "dropout.draw(static_cast<uint32_t>(query), from,"),
        ("const bool sees_nothing = sum[i] == 0.f;", "const bool sees_nothing = false;"),
    ),
    *kernel(
        "attention_tasks.h", "ops/test_attention.py ops/test_shapes.py",
        ("const int64_t queries = min(run, length - first);", "const int64_t queries = min(run, max(1, length - first - 1));"),
        ("const int64_t n = min(run, length - first);", "const int64_t n = min(run, length - first) - (first > 0);"),
    ),
    *kernel(
        "matmul.h", "ops/test_linear_product.py ops/test_attention.py",
        ("if (m - i >= 1) step(Count<1>{});", "if (m - i >= 1 && m < 9) step(Count<1>{});"),
    ),
    *kernel(
        "linear.cpp", "ops/test_linear_product.py",
        ("if (left & 1) step(left & 6, Count<1>{});", "if (left & 1) step(left & 4, Count<1>{});"),
        ("last ? task.bias : nullptr", "first ? task.bias : nullptr"),
        ("const bool first = part.depth.begin + k == 0,", "const bool first = k == 0,"),
    ),
    *kernel(
        "lazy_adam.cpp", "ops/test_lazy_adam.py ops/test_shapes.py",
        ("k += 4) add_rows<4, false>", "k += 4) add_rows<4, true>"),  # sums of more than four
        ("const vfloat v1 = c.beta2 * lanes.load(v + j)", "const vfloat v1 = c.beta1 * lanes.load(v + j)"),
        ("if (is_coupled) g += c.coupled * lanes.load(w + j);", ""),
        ("static_cast<uint32_t>(static_cast<int64_t>(*p.step)), 2 + 4 * p.number,", "static_cast<uint32_t>(static_cast<int64_t>(*p.step)), 2 + p.number,"),
        ("if (row == p.padding_idx) return false;", ""),
        ("p.row_steps[row] += moves(p, row);", "p.row_steps[row] += 1;"),
        ("return static_cast<float>(total / p.columns);", "return static_cast<float>(total / min(p.columns, kColumns));"),
    ),
    *kernel(
        "lazy_adam_groups.h", "ops/test_lazy_adam.py",
        ("if (opens(i)) start[before++] = static_cast<int32_t>(i);", "if (opens(i) || i == stretch.begin) start[before++] = static_cast<int32_t>(i);"),
        ("      to[mine[p.rows[position] >> shift & (digits - 1)]++] = position;\n    }\n#pragma omp barrier\n",
         "      to[mine[p.rows[position] >> shift & (digits - 1)]++] = position;\n    }\n"),  # a barrier
    ),
    *kernel(
        "lazy_adam_replay.cpp", "ops/test_lazy_adam_replay.py ops/test_shapes.py",
        ("to[k] = factor[k] * (from[k] + term);", "to[k] = factor[0] * (from[k] + term);"),
        ("const vfloat moved = m0 == 0.f ? vfloat{} : m0 * inverse * sum;", "const vfloat moved = m0 * inverse * sum;"),
    ),
    *python(
        "ops/gelu", "ops/test_fakes.py ops/test_gelu.py",
        ("torch.empty_like(x.new_empty(0) if bias is None else bias),", "x.new_empty(x.shape[-1]),"),
    ),
    *python(
        "ops/attention", "ops/test_attention.py ops/test_fakes.py",
        ("return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype", "return q.new_empty(q.shape), q.new_empty(q.shape[:2][::-1], dtype"),
    ),
    *python(
        "optim/gradients", "optim/test_gradients.py",
        ("ids = rows.unique()", "ids = rows"),
    ),
    *python(
        "optim/exchange", "optim/test_exchange.py",
        ("values / len(sizes) if average else values", "values"),
        ("    grad.index_copy_(0, ids, values)\n", "    grad.copy_(grad)\n"),
        ("(*self._arrived, *self._params)", "self._arrived[:0]"),
    ),
    *python(
        "optim/shards", "optim/test_exchange.py",
        ("ids = ids - first_row(param)", "ids = ids - 0"),
        ("dist.all_reduce(its, group=split[0].get_group(axis))", "pass"),
    ),
    *python(
        "optim/replay", "optim/test_replay.py",
        ('state["last_step"].index_fill_(0, rows, int(state["step"]))', 'state["last_step"].index_fill_(0, rows, int(state["step"]) - 1)'),
        ('state["recorded"] == history.shape[1] or state["recorded_with"].tolist() != list(options)', 'state["recorded"] == history.shape[1]'),
        ("        behind[padding_idx] = False\n", "        pass\n"),
    ),
    *python("optim/plan", "optim/test_lazy_adam.py optim/test_options.py",
            ("        if s.param is not param:\n            param.copy_(s.param)\n", "        pass\n")),
    *python("models/layers", "models/test_layers.py models/test_bert.py",
            ("return dropout(x, self.p, seed) if self.training else x", "return dropout(x, self.p, seed)")),
    *python(
        "data/masking", "data/test_masking.py",
        ("np.maximum(1, np.rint(n * mask_prob))", "np.rint(n * mask_prob)"),
        ("(sample << 33) | (fixed.astype(np.int64) << 32) | keys", "(sample << 33) | keys"),
    ),
    *python("data/masking", "data/test_units.py",
            ("actions[heads if _KINDS[unit].together else positions]", "actions[positions]"),
            ("if end - start <= left[b]), start)", "), start)")),
    *python("data/dictionary", "data/test_dictionary.py",
            ("if start >= free and not", "if not"), ("(span[0], -span[1])", "(span[0], span[1])")),
    *python("data/words", "data/test_words.py",
            ("(said == 0) | again", "said == 0"), ("begun[start] = begun[end] = 1", "begun[start] = 1"),
            ("[word] if is_wide(before[-1]) or is_wide(word[0]) else", "")),
    *python("data/packing", "data/test_packing.py",
            ("masked >= 0 and samples >= padding", "masked >= 0 and samples >= 0"),
            (" and masked >= needed[first]", ""),
            ("[(first,)] if tokens == shape.tokens else waiting.candidates", "waiting.candidates")),
    *python(
        "data/batches", "data/test_batches.py pretrain/test_evaluate.py",
        ("max_seqlen=int(np.diff(cu_seqlens).max()),", "max_seqlen=int(np.diff(cu_seqlens)[0]),"),
    ),
    *python("data/batch", "data/test_batches.py pretrain/test_evaluate.py",
            ("labels=F.pad(self.labels, (0, ignored), value=-100)", "labels=F.pad(self.labels, (0, ignored), value=0)")),
    *python("data/samples", "data/test_batches.py",
            ("token += np.where(token >= own_start, own_end - own_start, 0)", "pass")),
    *python("data/store", "data/test_store.py",
            ("if verify and _crc32(array) != checksum:", "if False:")),
    *python(
        "data/wordwise", "data/test_store.py data/test_wordwise.py",
        ("        self.tokenizer.encode_special_tokens = True\n", ""),
        ("total[between]", "total[between] - lengths[between]"),
    ),
    *python("data/shards", "data/test_shards.py data/test_shards_refused.py",
            ("if stores[-1].fingerprint != expected:", "if False:")),
    *python(
        "data/shard_writer", "data/test_shards.py data/test_shards_refused.py",
        ("if _has_ended(before, plan):\n        (store / PLAN).unlink()\n", "if _has_ended(before, plan):\n"),
        ("if (stat.st_size, stat.st_mtime_ns) != (size, changed):", "if False:"),
    ),
    *python("data/order", "data/test_order.py",
            ("word & masks[changed]", "word & masks[changed] >> 1"),
            ("items >= count", "items > count")),
    *python(
        "pretrain/snapshot", "pretrain/test_snapshot.py",
        ("for old in steps(folder)[:-keep]:", "for old in steps(folder)[: -keep - 1]:"),
        ("        if found[name][1] != digest:", "        if False:"),
    ),
    *python("pretrain/together", "pretrain/test_processes.py",
            ("model.skip_seeds(self.own.start, device)", "model.skip_seeds(0, device)"),
            ("ids[:1].expand(", "ids[:1].expand(0 * ")),
    *python("pretrain/stream", "pretrain/test_processes.py",
            ("epoch, first = epoch + 1, 0", "epoch, first, place = epoch + 1, 0, 0")),
    *python(
        "pretrain/schedule", "pretrain/test_schedule.py",
        ("min(total - done, falling) / max(1, falling)", "min(total - done - 1, falling) / max(1, falling)"),
    ),
    *python("pretrain/step", "pretrain/test_pretrain.py pretrain/test_steps.py",
            ("out.mlm_loss * word_share]", "out.mlm_loss / 2]"),
            ("for ids in (batch.input_ids, batch.labels)", "for ids in (batch.input_ids,)"),
            ("counts = torch.stack([(each != IGNORED).sum()", "counts = torch.stack([(each != 0).sum()")),
    *python("pretrain/divergence", "pretrain/test_divergence.py",
            ("torch.where(are_finite, numbers, self._numbers, out=self._numbers)", "self._numbers.copy_(numbers)")),
]  # fmt: skip


def run(command: list, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def link(copy: Path, build: Path, changed: str) -> str | None:
    """Compiles what includes the changed file and links it; None, or what the compiler said."""
    best = run(
        [sys.executable, "-c", "from fastbert.backends import native; print(native.isa)"], cwd=copy
    ).stdout.strip()
    plan = (build / "build.ninja").read_text()
    objects = {name: build / name for name in re.findall(r"^build (\S+\.o):", plan, re.MULTILINE)}
    source = re.search(r"compile (\S+)/csrc/bindings_cpu\.cpp", plan)[1]
    commands = run([shutil.which("ninja") or "ninja", "-C", build, "-t", "commands"]).stdout.splitlines()
    for name in objects:
        stem, isa = name.split(".")[:2]
        if isa == best and (copy / changed).resolve() in included(copy / f"csrc/cpu/{stem}.cpp"):
            (command,) = [line for line in commands if line.endswith(f" -o {name}")]
            command = re.sub(r"-MMD -MF \S+", "", command).replace(source, str(copy))
            command = command.replace("-O3", "-O1 -fexpensive-optimizations").replace(f"-o {name}", f"-o {copy / name}")
            done = run(["bash", "-c", command], cwd=copy)
            if done.returncode:
                return done.stdout[-2000:]
            objects[name] = copy / name
    (target,) = (copy / "fastbert").glob("_cpu*.so")
    done = run(["g++", "-shared", "-fopenmp", "-s", *objects.values(), "-o", target])
    return done.stdout if done.returncode else None


@contextlib.contextmanager
def planted(fault: Fault, build: Path) -> Iterator[tuple[Path, str | None]]:
    """A copy of the checkout with the fault, and what the compiler said where it refused it."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("build", ".git", ".venv", ".path", "__pycache__"))
        path = copy / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new, 1))
        yield copy, link(copy, build, fault.file) if fault.file.startswith("csrc") else None


def passes(copy: Path, folder: Path, fault: Fault) -> bool:
    """Whether these tests pass on the copy; they are copied into it, where they read its settings."""
    shutil.rmtree(copy / "tests", ignore_errors=True)
    shutil.copytree(folder, copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    files = [path for pattern in fault.tests.split() for path in sorted((copy / "tests").glob(pattern))]
    isas = ["-k", OTHERS] if fault.file.startswith("csrc") else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *isas, *files]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return run(command, cwd=copy, env=environment, timeout=900).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tests", type=Path, nargs="+", default=[ROOT / "tests"])
    parser.add_argument("--build", type=Path, default=next(iter((ROOT / "build").glob("temp*")), None))
    parser.add_argument("--only", default="", help="faults of files whose names contain this word")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.file]
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            sys.exit(f"{fault.file} holds {fault.old!r} {count} times: bring the fault in step with the sources")
    patterns = [pattern for fault in faults for pattern in fault.tests.split()]
    none = Fault("csrc/cpu/common.h", "", "", " ".join(dict.fromkeys(patterns)))  # which every kernel includes
    with planted(none, arguments.build) as (copy, problem):
        for folder in arguments.tests:
            if problem or not passes(copy, folder, none):
                sys.exit(f"without a fault the tests of {folder} fail already, or nothing is compiled: {problem}")
    found = dict.fromkeys(arguments.tests, 0)
    for number, fault in enumerate(faults, 1):
        verdicts = []
        with planted(fault, arguments.build) as (copy, problem):
            for folder in arguments.tests:
                start = time.perf_counter()
                is_found = problem is None and not passes(copy, folder, fault)
                found[folder] += is_found
                verdicts.append(f"{'found' if is_found else 'NOT FOUND'} {time.perf_counter() - start:.0f} s")
        print(
            f"{number:3} {fault.file:30} {fault.new.strip()[:60]!r:64} {', '.join(verdicts)} {problem or ''}",
            flush=True,
        )
    for folder, count in found.items():
        print(f"{count} of {len(faults)} found by {folder}")


if __name__ == "__main__":
    main()
