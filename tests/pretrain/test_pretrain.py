"""What a run leaves, learns and exports, and how many steps it takes."""

import dataclasses
import itertools
import json
import math
import random
import shutil

import pytest
import torch
from pretrain_runs import losses

from fastbert.models.bert import BertForPreTraining
from fastbert.pretrain import run as runs
from fastbert.pretrain import snapshot
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.processes import Processes
from fastbert.pretrain.report import last_scores, read_metrics


def test_a_run_leaves_everything(finished):
    names = {"config.json", "tokenizer", "data", "snapshots", "metrics.jsonl", "tensorboard", "loss.png", "model"}
    assert names <= {path.name for path in finished.iterdir()}
    curve = losses(finished)
    assert list(curve) == list(range(1, 41))
    scores = [r for r in read_metrics(finished / "metrics.jsonl") if "held_out/mlm_loss" in r]
    assert [r["step"] for r in scores] == [20, 40]
    assert scores[1]["held_out/mlm_loss"] < math.log(1000)
    assert snapshot.steps(finished / "snapshots") == [35, 40]
    assert any((finished / "tensorboard").iterdir())
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((finished / "config.json").read_text())
    assert stored["environment"] == snapshot.load(finished / "snapshots")["environment"], "all that a seed depends on"


def test_it_learns_from_context(settings, tmp_path):
    """Every document repeats one word: frequencies know nothing, the neighbours everything. In bfloat16, alone."""
    words = ["cat", "dog", "bird", "fish", "horse", "sheep", "goat", "mouse", "lion", "bear", "wolf", "deer"]
    draw = random.Random(0)
    corpus = tmp_path / "animals.txt"
    corpus.write_text("\n\n".join(" ".join([draw.choice(words)] * 25) + "." for _ in range(2000)))
    config = dataclasses.replace(
        settings,
        corpus=corpus,
        output=tmp_path / "run",
        vocab_size=100,
        steps=150,
        dropout=0.0,
        objective="mlm",
        bf16=True,
    )
    pretrain(config)
    scores = [r for r in read_metrics(config.output / "metrics.jsonl") if "held_out/mlm_loss" in r][-1]
    assert scores["held_out/frequency_loss"] > 2.0 and scores["held_out/mlm_loss"] < 0.5


def test_the_next_word_is_learned_from_those_before_it(settings, tmp_path, capsys):
    """Every document counts on from a random letter; nobody can know its first, and everybody the next."""
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    corpus = tmp_path / "alphabet.txt"
    starts = [draw.randrange(26) for _ in range(1500)]
    corpus.write_text("\n\n".join(" ".join(letters[(s + i) % 26] for i in range(12)) for s in starts))
    config = dataclasses.replace(
        settings, corpus=corpus, output=tmp_path / "run", vocab_size=64, steps=45, dropout=0.0, objective="clm",
        inputs="full-sentences", static_shapes=True, lr=1e-2,
    )  # fmt: skip
    pretrain(config)
    said = capsys.readouterr().out
    scores = last_scores(read_metrics(config.output / "metrics.jsonl"))
    chance = math.log(26)
    assert scores["frequency_loss"] == pytest.approx(chance, rel=0.05) and scores["mlm_accuracy"] > 11 / 12 - 0.05
    assert scores["mlm_loss"] < 1.3 * chance / 12, "one of twelve is a guess"
    assert "held-out, predicted tokens" in said and "next sentence" not in said
    assert BertForPreTraining.from_pretrained(config.output / "model").config.is_decoder


def test_the_export_is_the_trained_model(finished):
    exported = BertForPreTraining.from_pretrained(finished / "model")
    trained = snapshot.load(finished / "snapshots")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in exported.state_dict().items())
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    batch = tokenizer(["The yield expression is used when defining a generator.", "A class."], padding=True)
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    theirs = transformers.BertForPreTraining.from_pretrained(finished / "model").eval()(**batch).prediction_logits
    ours = exported.eval()(**batch).prediction_logits
    seen = batch["attention_mask"].bool()
    assert (ours - theirs)[seen].abs().max() < 1e-4


def a_second_a_step(monkeypatch, first=0):
    seconds = itertools.count(first)
    monkeypatch.setattr(Processes, "clock", lambda self: float(next(seconds)))


def test_minutes_are_kept_and_the_rate_follows_the_clock(settings, tmp_path, monkeypatch):
    """40 of 100 steps fit, and the rates are those of 40 steps; a resumed run goes on from the time that it had."""
    config = dataclasses.replace(settings, output=tmp_path / "timed", steps=100, minutes=40 / 60, warmup=0.25)
    a_second_a_step(monkeypatch)
    pretrain(config)
    records = read_metrics(config.output / "metrics.jsonl")
    rates = [r["lr"] / settings.lr for r in records if "lr" in r]
    # at no time yet steps decide; then a step's rate is that of the millisecond in which it begins
    assert rates[:10] == pytest.approx([1 / 25, *((1000 * step + 1) / 10_000 for step in range(1, 10))])
    assert rates[10:] == pytest.approx([(40 - step) / 30 for step in range(10, 40)])
    assert [r["step"] for r in records if "held_out/mlm_loss" in r] == [20, 40]
    assert snapshot.steps(config.output / "snapshots") == [35, 40] and (config.output / "model").is_dir()
    assert runs.read_config(config.output) == runs.with_choices(config)

    shutil.rmtree(config.output / "snapshots/step-00000040")
    a_second_a_step(monkeypatch, first=700)
    pretrain(runs.read_config(config.output), resume=True)
    assert [r["lr"] / settings.lr for r in read_metrics(config.output / "metrics.jsonl") if "lr" in r] == rates
