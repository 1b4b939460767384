"""fastbert prepare and runs that train from its store, from the command line on."""

import json
import os
import subprocess
import sys

import pytest
from pretrain_runs import assert_same_run, bad

from fastbert import cli, lock
from fastbert.data import open_stores
from fastbert.data.shards import read_index
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.settings import PretrainConfig

TINY = {
    "steps": 6, "seq_len": 32, "batch_tokens": 256, "lr": 3e-3, "evaluations": 1, "evaluation_batches": 2,
    "log_every": 1, "linear": "torch", "snapshot_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "store"
    arguments = ["--output", folder, "--vocab-size", "600", "--held-out", "0.1", "--workers", "1"]
    cli.run("prepare", [str(x) for x in (corpus, *arguments)])
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where there is one core
def test_a_run_from_a_store_is_the_run_from_its_corpus(store, corpus, tmp_path, capsys):
    """The same documents are held out, so the weights are the same, bit for bit; workers prepare the same batches."""
    ours = PretrainConfig(output=tmp_path / "store", store=store, workers=2, **TINY)
    theirs = PretrainConfig(output=tmp_path / "corpus", corpus=corpus, vocab_size=600, held_out=0.1, **TINY)
    assert pretrain(ours) and pretrain(theirs)
    assert_same_run(ours.output, theirs.output)
    assert not (ours.output / "data").exists() and json.loads((ours.output / "corpus.json").read_text())["shards"] == 1


def test_a_resumed_run_keeps_its_shards_where_others_are_added(store, tmp_path, capsys, monkeypatch):
    own, more = tmp_path / "store", tmp_path / "more.txt"
    subprocess.run(["cp", "-r", store, own], check=True)
    more.write_text("\n\n".join(f"more text number {i}. it goes on." for i in range(60)))
    run = PretrainConfig(output=tmp_path / "run", store=own, **TINY)
    assert pretrain(run)
    whole = PretrainConfig(output=tmp_path / "whole", store=store, **TINY)
    pretrain(whole)
    cli.run("prepare", [str(more), "--output", str(own), "--add", "--workers", "1"])
    assert len(read_index(own)["shards"]) == 2 and "2 shards" in capsys.readouterr().out
    for snapshot in sorted((run.output / "snapshots").iterdir())[1:]:
        subprocess.run(["rm", "-r", snapshot], check=True)
    assert pretrain(run, resume=True)
    assert_same_run(run.output, whole.output)
    cli.run("prepare", ["--verify", "--output", str(own)])
    assert "is whole: the checksums of its" in capsys.readouterr().out
    with open(own / "00001/train/tokens.bin", "r+b") as file:
        file.write(b"\xff")
    assert "tokens.bin is damaged, its checksum differs" in bad(
        capsys, monkeypatch, "prepare", "--verify", "--output", own
    )


def test_what_a_store_does_not_fit_is_refused(store, corpus, tmp_path, capsys, monkeypatch):
    def said(*arguments):
        return bad(capsys, monkeypatch, *arguments)

    run = ["pretrain", "--output", tmp_path / "run", "--steps", "1"]
    assert "the store" in said(*run, "--store", store, "--vocab-size", "64") and not (tmp_path / "run").exists()
    assert "give it as --store" in said(*run, "--corpus", store)
    assert "holds no token store" in said(*run, "--store", tmp_path)
    assert "is a finished store: give --add" in said("prepare", corpus, "--output", store)
    assert "a store is made of a corpus" in said("prepare", "--output", tmp_path / "x")
    assert "a store needs a folder" in said("prepare", corpus)
    assert "'more.txt' is one argument too many: a store is made of one file or folder" in said(
        "prepare", corpus, "more.txt"
    )
    assert "nor vocab.txt" in said("prepare", corpus, "--output", tmp_path / "x", "--tokenizer", tmp_path)
    assert "there is no folder" in said("prepare", corpus, "--output", tmp_path / "x", "--tokenizer", tmp_path / "y")
    assert "workers must be from 1" in said("prepare", corpus, "--output", tmp_path / "x", "--workers", "0")
    assert "seed must be from 0" in said("prepare", corpus, "--output", tmp_path / "x", "--seed", "-1")
    monkeypatch.setattr("fastbert.prepare.TRAINERS", {})  # which may read for hours, and come after what is refused
    new = "prepare", corpus, "--output", tmp_path / "x"
    assert "expected 0 < fraction <= 0.5, got 2.0" in said(*new, "--held-out", 2)
    assert "no finished store to add to" in said(*new, "--add")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    assert "holds other files (thesis.txt)" in said("prepare", corpus, "--output", tmp_path / "mine")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-16" in said("prepare", tmp_path / "bad.txt", "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists(), "it was written before the input was checked"
    with lock.hold(tmp_path / "mine", "writes there", "wait"):
        (tmp_path / "mine/thesis.txt").unlink()
        assert "is in use" in said("prepare", corpus, "--output", tmp_path / "mine")


def test_the_program_prepares_without_torch(corpus, store, tmp_path):
    """As the console script starts it: torch is not loaded, and two processes write what one wrote."""
    program = (
        "import sys; from fastbert_main import main; sys.argv[0] = 'fastbert'; main(); "
        "assert 'torch' not in sys.modules"
    )
    arguments = [corpus, "--output", tmp_path / "store", "--tokenizer", store / "tokenizer", "--held-out", "0.1"]
    command = [sys.executable, "-c", program, "prepare", *arguments, "--workers", "2"]
    said = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert open_stores(tmp_path / "store")[0].fingerprint == open_stores(store)[0].fingerprint
