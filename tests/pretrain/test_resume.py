"""What a resumed run must find, and what it says where something has changed."""

import dataclasses
import os
import re
import shutil

import pytest
import torch
from pretrain_runs import assert_same_run, bad

from fastbert import lock
from fastbert.backends import linear
from fastbert.ops import linear_timing
from fastbert.pretrain import environment, snapshot, training
from fastbert.pretrain import run as runs
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import last_scores, read_metrics, summary


def test_a_run_exists_once_its_data_does(settings, tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one document alone, of a single sentence.")
    config = dataclasses.replace(settings, output=tmp_path / "run", corpus=corpus, steps=1)
    with pytest.raises(ValueError, match="document"):
        pretrain(config)
    assert not (config.output / "config.json").exists()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "holds no run to resume" in text and "is started again without --resume" in text
    corpus.write_text("\n\n".join(f"giraffes eat leaves, {i} a day. so they grow." for i in range(60)))
    pretrain(config)
    assert "giraffes" in (config.output / "tokenizer/vocab.txt").read_text()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--corpus", corpus, "--steps", 5)
    assert "already holds a run (config.json): pass --resume" in text
    (config.output / "config.json").unlink()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--corpus", corpus, "--steps", 5)
    assert "already holds a run (snapshots)" in text, "a new run must not go on from an old one's snapshots"


def test_static_shapes_resume_in_the_same_bits(settings, tmp_path, capsys):
    """With words of a dictionary masked, of which the run keeps a copy, over nothing that is there."""
    words = tmp_path / "words.txt"
    words.write_text("yield expression\ngenerator function\n")
    config = dataclasses.replace(
        settings, output=tmp_path / "static", static_shapes=True, embedding_update="touched", masking="word",
        dictionary=words, steps=14, workers=1,
    )  # fmt: skip
    config.output.mkdir()
    (config.output / "dictionary.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"dictionary\.txt is there already, with other words than .*words\.txt"):
        pretrain(config)
    (config.output / "dictionary.txt").unlink()
    pretrain(config)
    words.unlink()
    said = capsys.readouterr().out
    assert re.search(r"shapes: 512 tokens, 32 sequences and 96 predictions in every batch; 0\.\d% of the tokens", said)
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    shutil.rmtree(run / "snapshots/step-00000014")
    shutil.rmtree(run / "model")
    pretrain(runs.read_config(run), resume=True)
    assert "not bit for bit" not in capsys.readouterr().out
    assert_same_run(run, config.output)
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 14
    (run / "dictionary.txt").write_text("yield expression")
    with pytest.raises(ValueError, match=r"was written with other words \(--words, --dictionary\) than these"):
        pretrain(runs.read_config(run), resume=True)


def test_resume_on_another_text_is_refused(settings, finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace(str(settings.corpus), str(tmp_path / "manual.txt"))
    )
    shutil.rmtree(run / "data")
    shutil.copy(settings.corpus, tmp_path / "manual.txt")
    pretrain(dataclasses.replace(settings, output=run), resume=True)  # elsewhere, the same text: its data is made again
    for name in ("train", "held_out"):
        assert (run / f"data/00000/{name}/meta.json").read_bytes() == (
            finished / f"data/00000/{name}/meta.json"
        ).read_bytes()

    shutil.rmtree(run / "data")
    (tmp_path / "manual.txt").write_text("\n\n".join("quite another text." for _ in range(100)))
    assert "is not known to be the one that the run began with" in bad(
        capsys, monkeypatch, "pretrain", "--output", run, "--resume"
    )
    shutil.copytree(finished / "data", run / "data")
    shutil.rmtree(run / "data/00000/held_out")
    shutil.copytree(run / "data/00000/train", run / "data/00000/held_out")
    assert "held_out is another shard than the store was written with" in bad(
        capsys, monkeypatch, "pretrain", "--output", run, "--resume"
    )


def test_one_run_trains_in_a_folder(finished, capsys, monkeypatch):
    with lock.hold(finished):
        text = bad(capsys, monkeypatch, "pretrain", "--output", finished, "--resume")
        assert f"is in use: process {os.getpid()} on" in text


def test_a_run_goes_on_without_its_metrics(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").unlink()
    pretrain(runs.read_config(run), resume=True)
    said = capsys.readouterr().out
    assert "metrics.jsonl is missing: training goes on, with records from step 41 on alone" in said
    before = last_scores(read_metrics(finished / "metrics.jsonl"))
    assert summary(before) in said, "the held-out scores are measured again"


def test_elsewhere_is_named(finished, capsys):
    state = snapshot.load(finished / "snapshots")
    config = runs.read_config(finished)
    environment.name_differences(state["environment"], config)
    assert capsys.readouterr().out == ""
    environment.name_differences(state["environment"] | {"threads": 77, "torch": "1.0"}, config)
    said = capsys.readouterr().out
    assert f"threads 77 -> {torch.get_num_threads()}" in said and "torch 1.0 ->" in said and "fastbert" not in said


def test_a_run_of_the_first_random_numbers_goes_on_and_says_so(settings, finished, tmp_path, capsys):
    """A snapshot that names no contract is of the first; the next one names ours, and nothing more is said."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "snapshots/step-00000040")
    state = snapshot.load(run / "snapshots")
    assert state["environment"].pop("random numbers") == 3 and state["step"] == 35
    shutil.rmtree(run / "snapshots")
    snapshot.save(run / "snapshots", 35, state, keep=2)
    said = "random numbers were drawn by contract 1, and are by contract 3 from here on: dropout, masking and the order"
    for times in (1, 0):
        assert pretrain(runs.read_config(run), resume=True) == run / "model"
        out = capsys.readouterr().out
        assert out.count(said) == out.count("not bit for bit") == times
    state = snapshot.load(run / "snapshots")
    assert state["step"] == 40 and state["environment"]["random numbers"] == 3


def test_the_library_of_products_is_chosen_once(settings, finished, tmp_path, monkeypatch, capsys):
    timed = []

    def fastest(*shape):
        timed.append(shape)
        return "onednn", "a test says so"

    monkeypatch.setattr(linear_timing, "fastest", fastest)
    monkeypatch.setattr(linear, "onednn_missing", None)
    monkeypatch.setattr(linear, "_requested", "auto")
    config = runs.new_run(dataclasses.replace(settings, output=tmp_path / "new"))
    assert config.linear == "onednn" and timed == [(512, 128, 512, torch.float32)]
    assert "linear products by onednn: a test says so" in capsys.readouterr().out
    with training.products(config):
        assert linear.chosen() == "onednn"
    assert environment.environment(config)["linear products"] == "onednn"
    config.output.mkdir()
    runs.write_config(config)
    assert runs.resumed_run(config.output) == config and len(timed) == 1, "a resumed run was timed again"

    # FASTBERT_LINEAR forces it, which a resumed run says
    monkeypatch.setattr(linear, "_requested", "torch")
    forced = runs.resumed_run(config.output)
    assert forced.linear == "torch"
    environment.name_differences(environment.environment(config), forced)
    assert "linear products onednn -> torch" in capsys.readouterr().out
    monkeypatch.setattr(linear, "_requested", "auto")
    in_bf16 = dataclasses.replace(settings, output=tmp_path / "bf16", bf16=True)
    assert runs.new_run(in_bf16).linear == "onednn" and timed[1:] == [(512, 128, 512, torch.bfloat16)]

    monkeypatch.setattr(linear, "onednn_missing", "it is gone")
    with pytest.raises(ValueError, match=r"it is gone\. FASTBERT_LINEAR=torch"):
        runs.resumed_run(config.output)
    assert snapshot.load(finished / "snapshots")["environment"]["linear products"] == runs.read_config(finished).linear


def test_a_damaged_store_is_named(settings, finished, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(settings, output=tmp_path / "damaged", steps=3)
    pretrain(config)
    tokens = config.output / "data/00000/train/tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "tokens.bin" in text
