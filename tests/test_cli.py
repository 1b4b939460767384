"""The program from outside: how it starts, what it refuses, what it says."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bert_batches import saved_bytes

from fastbert import cli, extras
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain import presets, settings
from fastbert.pretrain.settings import PretrainConfig
from fastbert.version import __version__

ROOT = Path(__file__).resolve().parent.parent
WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"
SCRIPT = "-c", "import sys; from fastbert_main import main; sys.argv[0] = 'fastbert'; main()"  # what pip installs
MODULE = "-m", "fastbert"


def started(how, *arguments, stdout=subprocess.PIPE, **environment):
    """`fastbert` as a process of its own, in which nobody has said how threads wait."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)], env=clean | environment,
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("how", [SCRIPT, MODULE], ids=["script", "module"])
def test_waiting_threads_sleep(how):
    """What counts is what OpenMP's runtime read, which it prints itself."""
    said = started(how, "info", OMP_DISPLAY_ENV="verbose")
    assert said.returncode == 0, said.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said.stderr
    assert said.stderr.count("GOMP_SPINCOUNT = '2000'") == 1, "the variables came too late for torch's OpenMP"
    policy = "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000"  # as it is set, and as users are told to set it
    assert f"threads wait by  {policy}\n" in said.stdout and f"fastbert's commands set {policy}," in said.stdout


def test_waiting_threads_do_as_the_user_says():
    said = started(SCRIPT, "info", OMP_DISPLAY_ENV="verbose", OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in said.stderr and "GOMP_SPINCOUNT = '2000'" not in said.stderr
    assert "threads wait by  OMP_WAIT_POLICY=active\n" in said.stdout


def test_a_bad_environment_is_a_sentence():
    said = started(SCRIPT, "info", FASTBERT_CPU_ISA="foo")
    assert said.returncode == 1 and said.stderr.startswith("fastbert info: FASTBERT_CPU_ISA names the instruction set")
    assert "'foo'" in said.stderr and said.stderr.count("\n") == 1


def test_what_stops_the_import_is_a_sentence():
    said = started(("-c", "import sys; sys.modules['torch'] = None; from fastbert_main import main; main()"))
    assert said.returncode == 1 and said.stderr.startswith("fastbert: import of torch")
    assert said.stderr.count("\n") == 1


def test_a_reader_that_has_enough_ends_it_quietly(monkeypatch):
    """As `| head -1` does; here the pipe is closed before anything is written, more than a buffer holds or less."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        said = started(SCRIPT, "pretrain", "--help", stdout=closed)
        assert (said.returncode, said.stderr) == (141, "")
        monkeypatch.setattr(sys, "stdout", closed)
        assert ended(monkeypatch, "info") == 141


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastbert", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"fastbert {__version__}\n"


def ended(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_commands_and_options_that_do_not_exist_are_named(monkeypatch, capsys, tmp_path):
    assert "there is no command 'train'" in ended(monkeypatch, "train")
    assert ended(monkeypatch, "info", "all") == "fastbert info takes no arguments, got all"
    assert ended(monkeypatch, "pretrain", "--output", tmp_path / "run", "--step", 5) == 2
    said = capsys.readouterr().err
    assert "--step" in said and "fastbert pretrain --help" in said and "Traceback" not in said
    assert ended(monkeypatch, "pretrain", "--steps", 5) == 2 and "--output" in capsys.readouterr().err
    assert ended(monkeypatch, "pretrain", "--output", tmp_path / "run", "--preset", "huge") == 2
    assert "huge" in capsys.readouterr().err and not (tmp_path / "run").exists()


def of_a_gpu(error):
    raise error


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.empty(2**60),
        lambda: of_a_gpu(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        lambda: of_a_gpu(RuntimeError("CUDA error: out of memory")),  # of a graph's own memory
    ],
    ids=["CPU", "GPU", "graph"],
)
def test_memory_used_up_is_a_sentence(monkeypatch, use):
    def pretrain(_):
        use()

    monkeypatch.setattr(cli, "pretrain", pretrain)
    said = ended(monkeypatch, "pretrain")
    assert "not enough memory; a smaller --batch-tokens" in said and "--checkpoint-layers" in said


GOOD = PretrainConfig(output=Path("run"), steps=5)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PretrainConfig) if f.type in (int, int | None)])
def test_integers_have_ranges(name):
    low, high = settings._INTEGERS[name]
    for wrong in (low - 1, high + 1, 99999999999999999999, 1.5, math.nan, "7", True):
        with pytest.raises(ValueError, match=f"^{name} must be an integer from {low} to {high}, got {wrong!r}$"):
            dataclasses.replace(GOOD, **{name: wrong}).check()


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(PretrainConfig) if f.type in (float, float | None)]
)
def test_numbers_have_ranges(name):
    for wrong in (math.nan, math.inf, -math.inf, -0.1, "0.5", False):
        with pytest.raises(ValueError, match=f"^{name} must be .*, got {wrong!r}$"):
            dataclasses.replace(GOOD, **{name: wrong}).check()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("objective", "sop"), ("objective", 1), ("model", "gpt"),
     ("bf16", "yes"), ("preset", "huge"), ("embedding_update", None), ("device", 0), ("device", "meta"),
     ("device", "cuda:99"), ("device", "nonsense")],
)  # fmt: skip
def test_other_settings_are_checked(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be .*{wrong!r}"):
        dataclasses.replace(GOOD, **{name: wrong}).check()


def test_the_extremes_of_settings_hold():
    GOOD.check()
    dataclasses.replace(GOOD, seed=2**64 - 1, warmup=1.0, dropout=0.0, minutes=60 * 24 * 366.0, lr=1e-30).check()


def test_large_seeds_reach_every_generator():
    from fastbert.data.draws import Purpose, draw

    torch.manual_seed(2**64 - 1)
    words = [draw(Purpose.MASK, seed, 0, torch.arange(4).numpy())[0].tolist() for seed in (2**64 - 1, 2**63, 0)]
    assert len({tuple(each) for each in words}) == 3


def test_a_resumed_run_keeps_its_settings():
    stored = dataclasses.replace(GOOD, steps=300, minutes=15.0, lr=1e-3)
    cli.check_unchanged(stored, dataclasses.replace(stored))  # what make demo asks for again
    for changed in ({"steps": 200}, {"lr": 1e-4}):
        with pytest.raises(ValueError, match=f"a resumed run keeps its settings; {next(iter(changed))} was"):
            cli.check_unchanged(stored, dataclasses.replace(stored, **changed))


def test_advice_can_be_followed():
    assert extras.missing("this needs", "json", "torch") is None
    said = extras.missing("this needs", "json", "no_such_package", "nor_this")
    assert said.startswith("this needs no_such_package, nor_this: pip install '.[pretrain]' in a checkout")
    sources = [ROOT / "fastbert_main.py", *(ROOT / "fastbert").rglob("*.py")]
    assert not [path for path in sources if "fastbert-kernels[" in path.read_text()]


def test_what_is_needed_at_the_end_is_missed_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = ended(monkeypatch, "pretrain", "--output", tmp_path / "run", "--steps", 5)
    assert said.startswith("fastbert pretrain: pretraining needs matplotlib: pip install '.[pretrain]'")


def test_parameters_are_berts():
    """Devlin et al. (2019) say 110 and 340 million; with the pretraining heads, counted in their checkpoints:"""
    assert presets.parameters(BertConfig.preset("base", vocab_size=30522)) == 110_106_428
    assert presets.parameters(BertConfig.preset("large", vocab_size=30522)) == 336_226_108


@pytest.mark.parametrize("layers", [1, 4])
def test_memory_is_what_autograd_saves(layers):
    config = BertConfig.preset("mini", vocab_size=2000, num_hidden_layers=layers)
    model = BertForPreTraining(config)
    counted = saved_bytes(model)
    assert presets.saved_for_backward(config, 1024) == pytest.approx(counted, rel=0.1)


def test_operations_by_hand():
    """One layer of width 128, 1,000 tokens in sequences of 10, vocabulary 100; 150 tokens predicted."""
    config = BertConfig.preset("tiny", num_hidden_layers=1, vocab_size=100)
    forward = 1000 * 2 * (3 * 128 * 128) + 1000 * 4 * 10 * 128  # projections, attention
    rest = 128 * 128 + 2 * 128 * 512
    forward += 150 * 2 * (rest + 128 * 128 + 128 * 100)
    assert presets.operations(config, 1000, 1000 * 10, 150) == pytest.approx(3 * forward)
    assert presets.operations(config, 1000, 1000 * 10, 150, 100) == pytest.approx(3 * (forward + 100 * 2 * rest))


def test_help_shows_what_presets_cost(monkeypatch, capsys):
    assert ended(monkeypatch, "pretrain", "--help") == 0
    said = capsys.readouterr().out
    for model, rates in presets.LEARNING_RATES.items():
        for name, lr in rates.items():
            line = next(line for line in said.splitlines() if line.startswith(f"{model} {name} "))
            assert f"{lr:g}" in line and "GFLOP" in line and "GB" in line
