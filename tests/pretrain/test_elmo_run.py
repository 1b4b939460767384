"""A run of ELMo from raw text: what it logs, that it resumes, what is exported, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from pretrain_runs import assert_same_run, bad

from fastbert import AutoModel, ElmoForPreTraining
from fastbert.data import load_tokenizer
from fastbert.embed import EmbedConfig, embed
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import read_metrics


@pytest.fixture(scope="module")
def elmo(settings, tmp_path_factory):
    config = dataclasses.replace(
        settings, output=tmp_path_factory.mktemp("elmo") / "run", model="elmo", steps=16, accumulate=2, seq_len=24,
        linear="torch",
    )  # fmt: skip
    pretrain(config)
    return config


def test_a_run_learns_logs_both_perplexities_and_exports(elmo):
    records = read_metrics(elmo.output / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    for record in steps:
        mean = (np.log(record["forward_perplexity"]) + np.log(record["backward_perplexity"])) / 2
        assert mean == pytest.approx(record["loss"], abs=1e-4) and 0 <= record["mlm_accuracy"] <= 1
    held_out = [record for record in records if "held_out/mlm_loss" in record][-1]
    both = [held_out[f"held_out/{side}_perplexity"] for side in ("forward", "backward")]
    assert np.log(both).mean() == pytest.approx(held_out["held_out/mlm_loss"], abs=1e-6)
    assert held_out["held_out/mlm_loss"] < held_out["held_out/frequency_loss"], "it has learned something"
    fields = json.loads((elmo.output / "model/config.json").read_text())
    assert (fields["model_type"], fields["cell_size"]) == ("fastbert-elmo", 128)


@pytest.mark.parametrize("more", [{}, {"sampled": 64, "static_shapes": True}])
def test_a_resumed_run_is_the_unbroken_one(elmo, tmp_path, more):
    unbroken = elmo
    if more:
        unbroken = dataclasses.replace(elmo, output=tmp_path / "whole", steps=9, **more)
        pretrain(unbroken)
    broken = tmp_path / "broken"
    shutil.copytree(unbroken.output, broken)
    shutil.rmtree(broken / "model")
    last = max(int(path.name[5:]) for path in (broken / "snapshots").iterdir())
    shutil.rmtree(broken / f"snapshots/step-{last:08d}")
    pretrain(dataclasses.replace(unbroken, output=broken), resume=True)
    assert_same_run(broken, unbroken.output)


def test_a_sampled_run_moves_the_rows_of_its_samples_alone(elmo, tmp_path, monkeypatch):
    seen = []
    step = LazyAdam.step

    def recorded(self, *args, **kwargs):
        params = [param for group in self.param_groups for param in group["params"]]
        seen.append([param.grad._indices().unique().numel() for param in params if param.grad.is_sparse])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LazyAdam, "step", recorded)
    config = dataclasses.replace(elmo, output=tmp_path / "run", steps=2, accumulate=1, sampled=20)
    model = ElmoForPreTraining.from_pretrained(pretrain(config))
    assert len(seen) == 2 and all(len(rows) == 2 and rows[0] == rows[1] < 1000 for rows in seen), "weight and bias"
    records = read_metrics(config.output / "metrics.jsonl")
    assert "mlm_accuracy" not in records[0] and any("held_out/mlm_accuracy" in record for record in records)
    assert torch.isfinite(model.softmax.weight).all()


def test_a_run_goes_on_from_a_folder(elmo, tmp_path):
    config = dataclasses.replace(
        elmo, output=tmp_path / "run", init=elmo.output / "model", model="bert", vocab_size=8192, steps=1, dropout=0.0,
    )  # fmt: skip
    before, after = (ElmoForPreTraining.from_pretrained(path) for path in (config.init, pretrain(config)))
    moved = (after.softmax.weight - before.softmax.weight).abs().max()
    assert after.config.dropout == 0.0 and 0 < moved < 0.1


def test_vectors_of_texts_are_means_of_layers(elmo, tmp_path):
    folder, texts = elmo.output / "model", ["A class is defined.", "The yield expression", ""]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    embed(EmbedConfig(folder, tmp_path / "texts.txt", tmp_path / "x.npy", layers=(0, -1), batch_tokens=16))
    model, tokenizer = AutoModel.from_pretrained(folder), load_tokenizer(folder)
    found = np.load(tmp_path / "x.npy")
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).hidden_states
        np.testing.assert_allclose(vector, ((states[0] + states[2]) / 2)[0].mean(0), rtol=0, atol=1e-5)


def test_what_does_not_hold_is_refused(elmo, capsys, monkeypatch, tmp_path):
    def said(*arguments):
        start = "pretrain", "--corpus", elmo.corpus, "--output", tmp_path / "x", "--steps", 1
        return bad(capsys, monkeypatch, *start, *arguments)

    assert "objective must be bilm for model elmo, got 'mlm'" in said("--model", "elmo", "--objective", "mlm")
    assert "mlm+sop, clm for model bert, got 'bilm'" in said("--objective", "bilm")
    assert "sampled must be left out but for model elmo, got 8" in said("--sampled", 8)
    assert "masking must be left out with model elmo" in said("--model", "elmo", "--masking", "word")
    assert "bf16 must be left out with model elmo" in said("--model", "elmo", "--bf16")
    model = elmo.output / "model"
    for command in (["fill", model, "a [MASK]"], ["attention", model, "a", "--output", tmp_path / "a.html"]):
        assert "holds an ELMo, which has no attention, no [MASK]" in bad(capsys, monkeypatch, *command)
