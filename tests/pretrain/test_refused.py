"""What the program refuses, in a sentence and before anything is written; what it says of itself."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pretrain_runs import bad

from fastbert import cli
from fastbert.backends import triton
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.run import resumed_run
from fastbert.pretrain.settings import PretrainConfig


@pytest.mark.parametrize("name", ["model", "loss.png", "tensorboard", "."])
def test_nothing_that_is_there_is_written_over(settings, tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(exist_ok=True)
    mine = tmp_path / "file" if name == "." else mine
    mine.write_text("precious")
    output = mine if name == "." else mine.parent
    with pytest.raises(ValueError, match=r"is a file: choose another|is there already"):
        pretrain(dataclasses.replace(settings, output=output))
    assert mine.read_text() == "precious"


def test_bad_input_gets_a_sentence(tmp_path, corpus, finished, capsys, monkeypatch):
    def said(*arguments, output=tmp_path / "new"):
        text = bad(capsys, monkeypatch, "pretrain", "--output", output, *arguments)
        assert not (tmp_path / "new").exists(), "something was written before the input was checked"
        return text

    empty, folder = tmp_path / "empty.txt", tmp_path / "folder"
    empty.touch()
    folder.mkdir()
    assert "needs a corpus" in said("--steps", 5)
    assert "missing.txt" in said("--steps", 5, "--corpus", tmp_path / "missing.txt")
    assert "empty.txt" in said("--steps", 5, "--corpus", empty)
    assert "folder" in said("--steps", 5, "--corpus", folder)
    assert "so many steps or minutes: give --steps" in said("--corpus", corpus)
    assert "position table, max_position_embeddings=512, got 600" in said(
        "--corpus", corpus, "--steps", 5, "--seq-len", 600, "--batch-tokens", 6000
    )
    assert "lr must be a number above 0, got nan" in said("--corpus", corpus, "--steps", 5, "--lr", "nan")
    for setting, value, message in (
        ("batch-tokens", 64, "batch_tokens must be at least one sample's, of 128 tokens, got 64"),
        ("vocab-size", 10, "vocab_size must be an integer from 64 to"),
        ("held-out", 0.7, "held_out must be a share above 0 and at most 0.5, got 0.7"),
        ("device", "gpu", "device must be one that torch has here, got 'gpu'"),
    ):
        new = tmp_path / setting
        assert message in said("--corpus", corpus, "--steps", 5, f"--{setting}", value, output=new)
        assert not new.exists()
    for settings, message in (
        ("--model albert --objective clm", "objective must be one with mlm for model albert, which sees all words"),
        (
            "--masking span --objective clm",
            "masking must be left out with objective clm, which masks nothing, got 'span'",
        ),
        (f"--dictionary {corpus}", "masking must be word, ngram or span with a dictionary, got 'token'"),
        ("--words jieba", "masking must be word, ngram or span with --words jieba, got 'token'"),
        (f"--masking word --dictionary {empty}", "empty.txt has no word: expected one a line"),
        ("--inputs full-sentences", "objective must be mlm or clm with inputs full-sentences, no pairs, got 'mlm+nsp'"),
    ):
        assert message in said("--corpus", corpus, "--steps", 5, *settings.split())
    damaged = tmp_path / "config.json"
    good = json.loads((finished / "config.json").read_text())
    for content, problem in (
        (b"{", "Expecting"), (b"\xff", "utf-8"), (b"[]", "it is no JSON object"), (b"{}", "it lacks corpus"),
        (good | {"colour": 1}, "colour"), ({k: v for k, v in good.items() if k != "lr"}, "it lacks lr"),
        (good | {"steps": "5"}, ""), (good | {"corpus": 3}, ""), (good | {"lr": math.nan}, "lr must be"),
    ):  # fmt: skip
        damaged.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        ended = said("--resume", output=tmp_path)
        assert "config.json does not hold the settings of a run: " in ended and problem in ended
    damaged.write_text(json.dumps(good | {"preset": "mini"}))
    for name in ("tokenizer", "data", "snapshots"):
        shutil.copytree(finished / name, tmp_path / name)
    assert "config.json describes another model than the snapshot" in said("--resume", output=tmp_path)
    damaged.unlink()
    assert "holds no run to resume" in said("--resume")
    assert "already holds a run (config.json): pass --resume" in said("--corpus", corpus, "--steps", 5, output=finished)
    changed = said("--resume", "--lr", 0.5, output=finished)
    assert "a resumed run keeps its settings; lr was 0.003, now 0.5" in changed
    assert "there is no command 'train'" in bad(capsys, monkeypatch, "train")


def test_info(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastbert", "info"])
    cli.main()
    said = capsys.readouterr().out
    assert "instruction set" in said and "attention" in said
    monkeypatch.setattr(triton, "interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, why in (("triton", "torch sees no GPU"), ("gpu", "no backend is called 'gpu'")):
        # FASTBERT_BACKEND, read when the package is imported
        monkeypatch.setattr(sys.modules["fastbert.backends"], "_requested", name)
        assert why in bad(capsys, monkeypatch, "info")
        with pytest.raises(ValueError, match=why):
            resumed_run(Path("nowhere"))


def test_help_names_every_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["fastbert", "pretrain", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    for field in dataclasses.fields(PretrainConfig):
        assert field.name.replace("_", "-") in text
    assert "resume" in text
    said = " ".join(text.replace("│", " ").split())
    assert "The same corpus, settings and seed give the same weights, bit for bit, where" in said
