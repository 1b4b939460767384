"""`fastbert bench`: what is counted and judged, what a comparison says, and the page in a real browser."""

import csv
import json
import re
import sys
import types

import browser
import pytest
import torch
from pretrain_runs import bad

from fastbert import cli
from fastbert.bench import peers, plan, problems, products, report, results, run, step, timing
from fastbert.bench.measure import Taken, cases
from fastbert.bench.problem import Judge, Variant
from fastbert.bench.settings import BenchConfig

TINY = {
    "gelu": (8, 48), "rows": (8, 48), "cross_entropy": (4, 60), "attention": [(2, 8, 0.1, True)],
    "linear": [(8, 16, 24)], "tables": [(100, 8, 16)], "step": ("tiny", 2, 8), "lengths": (16, [4, 8]),
    "vocabularies": (4, [20, 40, 80]), "rows of tables": (4, 16, [50, 100]),
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(plan.SHAPES, "quick", TINY)
    monkeypatch.setitem(run.CEILINGS, "quick", (1 << 16, 32))


def bench(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastbert", "bench", "--quick", "--repeats", "3", *map(str, arguments)])
    cli.main()


def rows_of(folder):
    with open(folder / "bench.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_draws_what_was_measured(tiny, tmp_path, monkeypatch, capsys):
    bench(monkeypatch, "--output", tmp_path)
    said = capsys.readouterr().out
    assert "not measured: Liger: its kernels run on a GPU alone" in said and said.endswith("bench.html\n")
    rows = rows_of(tmp_path)
    ops = {row["op"] for row in rows}
    assert {"gelu tanh with bias", "layer_norm", "dropout", "cross_entropy", "attention", "linear"} <= ops
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["verified"] in ("yes", "") and (
            row["variant"] != "fastbert" or row["verified"] or row["op"][:5] == "train"
        )
        assert row["variant"] != row["reference"] or float(row["ratio"]) == 1
    page = tmp_path / "bench.html"
    assert (
        "http://" not in page.read_text().replace("http://www.w3.org/2000/svg", "") and "https" not in page.read_text()
    )
    with browser.page(page) as opened:
        count = "document.querySelectorAll('%s').length"
        for dtype in ("bfloat16", "float32"):
            opened.click(f"button[data-value='{dtype}']")
            opened.click("button[data-value='forward']")
            drawn = [
                row for row in rows
                if row["dtype"] == dtype and row["variant"] != "copy" and not row["axis"]
                and row["pass"] != "forward+backward"
            ]  # fmt: skip
            compared = [row for row in drawn if row["ratio"] and row["variant"] != row["reference"]]
            assert opened.value(count % "#bars .bar") == opened.value(count % "#bars .whisker") == len(compared)
            counted = [row for row in drawn if row["flops"] and row["bytes"]]
            assert opened.value(count % "#roofline .point") == len(counted) > 0
        # The lowest point on the slope: as high above the axis as its rate says, to a pixel of the viewBox.
        row = next(row for row in drawn if row["op"] == "dropout" and row["variant"] == "fastbert")
        title = opened.value("[...document.querySelectorAll('#roofline title')].map(t => t.textContent)"
                             ".find(t => t.startsWith('dropout,') && t.includes('fastbert'))")  # fmt: skip
        assert float(re.search(r"([\d.e+-]+) GB/s", title)[1]) == pytest.approx(float(row["gb_per_s"]))
        axes = opened.value("[...document.querySelectorAll('.sweep')].map(s => [s.dataset.axis, "
                            "s.querySelectorAll('.line').length, s.querySelectorAll('circle').length])")  # fmt: skip
        assert axes == [["sequence length", 2, 4], ["vocabulary", 2, 6], ["rows of the table", 3, 6]]
        assert opened.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
        assert "NaN" not in opened.dom().partition("</script>")[2] and not re.search(r'="[^"]*NaN', opened.dom())
        assert opened.requests == [page.resolve().as_uri()] and not opened.errors


def test_a_wrong_op_stops_the_run_by_its_name(tiny, tmp_path, monkeypatch, capsys):
    right = problems.our_gelu
    monkeypatch.setattr(
        problems, "our_gelu", lambda x, *more, **named: right(x, *more, **named) + (x.dtype != torch.float64)
    )
    said = bad(capsys, monkeypatch, "bench", "--quick", "--output", tmp_path, "--only", "gelu")
    assert re.match(r"fastbert bench: gelu with bias, 8 x 48, float32: y is off by 1.0.*not timed", said)
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_hold_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    assert "repeats must be at least 1, got 0" in bad(capsys, monkeypatch, "bench", "--repeats", 0)
    (tmp_path / "old.csv").write_text("a,b\n1,2\n")
    said = bad(capsys, monkeypatch, "bench", "--compare", tmp_path / "old.csv")
    assert "old.csv is no bench.csv of fastbert bench: it has no rows with op, case" in said
    columns = *results.KEY, *results.RATIOS, "sittings"
    (tmp_path / "old.csv").write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")
    said = bad(capsys, monkeypatch, "bench", "--compare", tmp_path / "old.csv")
    assert "old.csv is of a run that ended after 1 of 5 sittings" in said
    assert "No such file" in bad(capsys, monkeypatch, "bench", "--compare", tmp_path / "none.csv")
    if not torch.cuda.is_available():
        assert "finds no GPU" in bad(capsys, monkeypatch, "bench", "--device", "cuda")


def test_a_table_that_was_cut_off_is_refused(tmp_path, monkeypatch, capsys):
    columns = *results.KEY, *results.RATIOS, "sittings", "cpu"
    whole = ",".join(columns) + "\n" + 2 * (",".join("5" for _ in columns) + "\n")
    for data, said in (
        (whole[:-6].encode(), "is cut off in its last line"),
        (b"", "is no bench.csv"),
        (b"\xff\xfe\x00", "is no bench.csv"),
        (b"<script>" + b"1" * (1 << 18), "is no bench.csv"),
    ):
        (tmp_path / "old.csv").write_bytes(data)
        assert f"old.csv {said}" in bad(capsys, monkeypatch, "bench", "--compare", tmp_path / "old.csv")


def test_an_interrupted_run_keeps_what_was_measured(tiny, tmp_path, monkeypatch, capsys):
    sit, sat = Taken.sit, []

    def interrupted(self, case, *more):
        sat.append(case)
        if len(sat) == 4:
            raise KeyboardInterrupt
        sit(self, case, *more)

    monkeypatch.setattr(Taken, "sit", interrupted)
    with pytest.raises(SystemExit, match="130"):
        bench(monkeypatch, "--output", tmp_path, "--only", "gelu", "--dtype", "float32")
    assert [name.name for name in tmp_path.iterdir()] == ["bench.csv"]
    assert {row["case"] + row["pass"] for row in rows_of(tmp_path)} == {case.shape + case.direction for case in sat[:3]}


def test_what_takes_long_sits_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LONG", 0.0)
    bench(monkeypatch, "--output", tmp_path, "--only", "gelu", "--dtype", "float32")
    with open(tmp_path / "bench.csv", newline="") as file:
        assert {row["sittings"] for row in csv.DictReader(file)} == {"1"}
    assert (tmp_path / "bench.html").is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run.rates, "measure", lambda *_: pytest.fail("it was measured"))
    assert "/proc/bench" in bad(capsys, monkeypatch, "bench", "--quick", "--output", "/proc/bench")


def test_a_compiled_step_that_raises_is_left_out(monkeypatch):
    pytest.importorskip("transformers")

    def compiled(model):
        def call(**inputs):
            raise RuntimeError("InvalidCxxCompiler: no g++\nand more")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    missing = {}
    (case,) = step.cases("tiny", 2, 8, "float32", "cpu", {peers.TRANSFORMERS, peers.COMPILED}, missing)
    assert list(case.variants) == ["fastbert", "transformers"]
    assert missing == {"transformers compiled, float32": "RuntimeError: InvalidCxxCompiler: no g++"}


def test_nothing_left_to_measure_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "bfloat16_products", False)
    with pytest.raises(ValueError, match="nothing is left to measure: --quick leaves out linear layers"):
        run.bench(BenchConfig(tmp_path, quick=True, only=("linear",), dtype=("bfloat16",)))


def test_a_run_is_compared_with_an_earlier_one(tiny, tmp_path, monkeypatch, capsys):
    """An earlier run whose fastbert was ten thousand times as fast beside torch's: every ratio of it got slower."""
    bench(monkeypatch, "--output", tmp_path, "--only", "dropout", "--dtype", "float32")
    old = rows_of(tmp_path)
    for row in old:
        if row["variant"] == "fastbert":
            row |= {name: str(1e4 * float(row[name])) for name in results.RATIOS}
    text = "\n".join([",".join(old[0]), *(",".join(f'"{value}"' for value in row.values()) for row in old)])
    (tmp_path / "old.csv").write_text(text + "\n")
    capsys.readouterr()
    given = "--output", tmp_path, "--only", "dropout", "--dtype", "float32", "--compare", tmp_path / "old.csv"
    bench(monkeypatch, *given)
    said = capsys.readouterr().out
    assert "2 of 2 ratios changed" in said
    assert "dropout, 8 x 48, forward, float32: fastbert is slower" in said
    data = json.loads(re.search("const data = (.*);", (tmp_path / "bench.html").read_text())[1])
    assert any("2 of 2 ratios changed" in line for line in data["compared"])


@pytest.mark.parametrize(
    "before, after, factor",
    [
        ((1.9, 2.0, 2.1), (1.9, 2.0, 2.1), None),
        ((1.9, 2.0, 2.3), (2.2, 2.5, 2.6), None),  # they meet
        ((1.9, 2.0, 2.05), (2.1, 2.15, 2.2), None),  # apart, by less than two processes differ
        ((1.9, 2.0, 2.1), (2.4, 2.5, 2.6), 1.25),
        ((1.9, 2.0, 2.1), (0.9, 1.0, 1.1), 0.5),
    ],
)
def test_a_change_counts_beyond_the_noise_of_both_runs(before, after, factor):
    def written(ratios, cpu):
        of_torch = dict(zip(results.RATIOS, ("1", "1", "1"), strict=True))
        of_ours = dict(zip(results.RATIOS, map(str, ratios), strict=True))
        key = {"op": "gelu", "case": "8 x 48", "pass": "forward", "dtype": "float32", "reference": "torch", "cpu": cpu}
        key["sittings"] = "5"
        return [key | {"variant": "torch"} | of_torch, key | {"variant": "fastbert"} | of_ours]

    found = results.compare(written(before, "a"), written(after, "b"))
    assert found.compared == 1 and not found.alone and found.notes == ["cpu was a, now b"]
    assert [change.factor for change in found.changes] == ([] if factor is None else [pytest.approx(factor)])
    another = results.compare(written(before, "a"), [row | {"op": "dropout"} for row in written(after, "a")])
    assert another.compared == 0 and len(another.alone) == 2
    long = results.compare(written(before, "a"), [row | {"sittings": "1"} for row in written(after, "a")])
    assert (long.compared, long.alone, long.once) == (0, [], 1) and "1 had one sitting" in report.said(long)


def test_rounds_begin_with_another_variant_each_and_end_with_the_time():
    called = []
    variants = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.rounds(variants, repeats=4, warmup=1)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(its) for its in seconds.values()] == [4, 4, 4]
    limited = timing.rounds(variants, repeats=9, warmup=9, limit=0.0)
    assert [len(its) for its in limited.values()] == [1] * 3


def test_ratios_are_taken_within_rounds():
    """A clock that is ten times as slow in the second round: the ratio is 2 all the same."""
    found = timing.ratios({"ours": [1.0, 10.0, 1.0], "torch": [2.0, 20.0, 2.0]}, "torch")
    assert found == {"ours": [2.0, 2.0, 2.0], "torch": [1.0, 1.0, 1.0]}


def test_bytes_and_operations_are_what_the_shapes_say():
    gelu = problems.gelu(4, 8, torch.bfloat16)
    assert gelu.sizes == (2 * 4 * 8 * 2, 5 * 4 * 8 * 2)
    loss = problems.cross_entropy(4, 8, torch.float32)
    assert loss.sizes == (4 * 8 * 4, 3 * 4 * 8 * 4)
    linear = products.linear(2, 3, 5, torch.float32)  # x 6, weight 15, bias 5, y 10 numbers
    assert linear.sizes == (4 * 36, 4 * (36 + 36 + 21)) and linear.flops == (2 * 30, 6 * 30)
    attention = products.attention([1, 3], 0.0, torch.float32)  # 12 heads of 64
    assert attention.flops == (4 * 10 * 12 * 64, 14 * 10 * 12 * 64)


def test_others_are_judged_and_left_out_where_they_raise(monkeypatch):
    """A peer that is wrong is timed and marked; one whose interface is another one is named with what it said."""
    wrong = types.SimpleNamespace(LigerCrossEntropyLoss=lambda: lambda x, labels: x.float().logsumexp(1).mean())
    modules = {
        "liger_kernel.transformers.cross_entropy": wrong,
        "quack.cross_entropy": types.SimpleNamespace(cross_entropy=lambda logits: logits),
    }
    monkeypatch.setattr(peers.importlib, "import_module", modules.__getitem__)
    problem, missing = problems.cross_entropy(4, 60, torch.float32, {peers.LIGER, peers.QUACK}), {}
    forward, both = cases(problem, False, missing, {})
    assert set(forward.variants) == {"fastbert", "torch", peers.LIGER} and (forward.size, both.size) == problem.sizes
    assert forward.verdicts["fastbert"].wrong is None and "loss is off by" in forward.verdicts[peers.LIGER].wrong
    nan = Variant(lambda x: x.float().sum() * float("nan"), problem.ours.inputs, problem.ours.dy)
    verdict = Judge(problem).another(nan)
    assert verdict.error is None and "loss is off by nan" in verdict.wrong
    assert list(missing) == ["quack, cross_entropy 4 x 60 float32"] and "TypeError" in missing[next(iter(missing))]


def test_every_sitting_compiles_anew(monkeypatch):
    """What torch.compile remembers of other problems counts towards its limit, past which it runs eagerly."""
    called, judged = [], {}
    monkeypatch.setattr(torch.compiler, "reset", lambda: called.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: called.append("compile") or function)
    for _ in range(2):
        cases(problems.gelu(8, 48, torch.float32), True, {}, judged)
    assert called == ["reset", "compile"] * 2


def test_peers_that_are_not_here_have_a_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "flash_attn" else object())

    def broken(name):
        raise OSError(f"{name}.so: undefined symbol\nand more")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    assert peers.why_not(peers.FLASH, "cpu") == "its kernels run on a GPU alone"
    assert peers.why_not(peers.FLASH, "cuda") == "not installed: pip install flash-attn"
    assert peers.why_not(peers.QUACK, "cuda") == "installed and broken: OSError: quack.so: undefined symbol"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tiny, tmp_path, monkeypatch):
    bench(monkeypatch, "--output", tmp_path, "--device", "cuda", "--dtype", "bfloat16")
    timed = {row["variant"]: row["timed"] for row in rows_of(tmp_path) if row["op"] in ("gelu", "lazy_adam")}
    assert timed["fastbert"] == "graph" and timed["SparseAdam"] == "launched"
