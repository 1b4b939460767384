"""A fine-tuning that was stopped or killed goes on to the bits of an unbroken one; what it refuses to go on from."""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import sys

import pytest
import torch
from finetune_tables import make_encoder, rows, write
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from fastbert import cli, lock
from fastbert.finetune import FinetuneConfig, finetune, loop
from fastbert.finetune.training import Trainer
from fastbert.pretrain import snapshot


class Killed(BaseException):
    """In place of a kill: nothing behind it runs but `finally`."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of 96 rows 86 to train on: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("resume")
    return FinetuneConfig(
        make_encoder("bert", folder / "bert", dropout=0.1), write(folder / "train.csv", rows(96)), folder / "run",
        lr=1e-2, epochs=4, batch_size=16, snapshot_every=4,
    )  # fmt: skip


@pytest.fixture
def at_step(monkeypatch):
    """Does something once, when a step with this number has been taken."""
    take = Trainer._take_step
    planned = {}

    def step(self, places):
        loss = take(self, places)
        planned.pop(self.step + 1, lambda: None)()
        return loss

    monkeypatch.setattr(Trainer, "_take_step", step)
    return planned


def kill():
    raise Killed


def result(folder):
    scores = json.loads((folder / "scores.json").read_text())
    del scores["settings"]["output"]
    return scores, load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"regression": True, "label": "number", "bf16": True}], ids=["classes", "numbers"]
)
def test_however_it_is_broken_off_it_ends_in_the_same_bits(config, changes, tmp_path, at_step, monkeypatch, capsys):
    unbroken = dataclasses.replace(config, output=tmp_path / "unbroken", **changes)
    finetune(unbroken)
    broken = dataclasses.replace(unbroken, output=tmp_path / "broken")
    folder = broken.output / "snapshots"

    at_step[2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert finetune(broken) is None and snapshot.steps(folder) == [2]
    with monkeypatch.context() as patch, pytest.raises(Killed):  # between an epoch's snapshot and its export
        patch.setattr(loop, "_export", lambda *_: kill())
        finetune(broken, resume=True)
    assert snapshot.steps(folder) == [4, 6] and not (broken.output / "model").exists()
    at_step[11] = kill
    with pytest.raises(Killed):
        finetune(broken, resume=True)
    assert snapshot.steps(folder) == [6, 8] and (broken.output / "model").is_dir()
    at_step[12] = lambda: os.kill(os.getpid(), signal.SIGTERM)  # an epoch's last step: it is evaluated first
    assert finetune(broken, resume=True) is None and snapshot.steps(folder) == [8, 12]
    said = capsys.readouterr().out
    for name, step in (("SIGINT", 2), ("SIGTERM", 12)):
        assert f"stopped by {name} after step {step} of 24; go on with: fastbert finetune --output" in said
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_write_report", lambda *_: kill())
        finetune(broken, resume=True)
    assert finetune(broken, resume=True) == broken.output / "model"

    (ours, weights), (expected, theirs) = result(broken.output), result(unbroken.output)
    assert ours == expected and weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    picture = "predictions.png" if changes else "confusion.png"
    assert {path.name for path in broken.output.iterdir()} == {".lock", "config.json", "model", "scores.json", picture}


def test_another_thread_trains_too_and_signals_stay_the_program_s(config, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    short = dataclasses.replace(config, output=tmp_path / "run", epochs=1)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(finetune, short).result() == tmp_path / "run/model"
    assert signal.getsignal(signal.SIGINT) is before


def said(monkeypatch, *arguments, command="finetune"):
    monkeypatch.setattr(sys, "argv", ["fastbert", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_resumes_what_it_stopped_and_says_what_does_not_hold(config, tmp_path, at_step, monkeypatch):
    run = tmp_path / "run"
    given = "--init", config.init, "--train", tmp_path / "train.csv", "--lr", 0.01, "--batch-size", 16, "--epochs", 2
    table = config.train.read_text()
    (tmp_path / "train.csv").write_text(table)
    resume = "--output", run, "--resume"
    assert "holds no run to resume" in said(monkeypatch, *resume) and not run.exists()
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "this training runs in one process, and WORLD_SIZE=2 says" in said(patch, *given, "--output", run)
    assert not run.exists()
    at_step[9] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert said(monkeypatch, *given, "--output", run) == 130

    def tree():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    before = tree()
    assert "already holds a run (config.json): pass --resume" in said(monkeypatch, *given, "--output", run)
    assert "a resumed run keeps its settings; epochs was 2, now 9" in said(monkeypatch, *resume, "--epochs", 9)
    with lock.hold(run):
        assert "is in use: process" in said(monkeypatch, *resume)
    (tmp_path / "train.csv").write_text(table.replace("lovely", "great"))
    assert "are not those that the run in" in said(monkeypatch, *resume)
    (tmp_path / "train.csv").unlink()
    assert "train.csv does not exist" in said(monkeypatch, *resume)
    (tmp_path / "train.csv").write_text(table)
    stored = (run / "config.json").read_text()
    for text, why in (("[]", "it is no JSON object"), (stored.replace('"lr"', '"rl"'), "it lacks lr"),
                      (stored.replace('"lr": 0.01', '"lr": -1'), "lr must be from 0")):  # fmt: skip
        (run / "config.json").write_text(text)
        assert re.search(
            rf"does not hold the settings of a run of fastbert finetune: .*{why}", said(monkeypatch, *resume)
        )
    (run / "config.json").write_text(stored)
    (run / "model").rename(tmp_path / "model")
    assert "is missing, the model of epoch 1, the best so far: put it back" in said(monkeypatch, *resume)
    (tmp_path / "model").rename(run / "model")
    assert tree().keys() == before.keys()

    assert said(monkeypatch, *resume, *given) == 0
    assert len(json.loads((run / "scores.json").read_text())["epochs"]) == 2
    assert "has ended, its model is" in said(monkeypatch, *resume)
    assert "is there already" in said(monkeypatch, *given, "--output", run)
    assert f"is the folder of a run, and its model is in {run / 'model'}: name that folder" in said(
        monkeypatch, run, config.train, "--text", "text", command="predict"
    )
