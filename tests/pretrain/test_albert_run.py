"""Runs of either model with either objective: ALBERT's own recipe killed and resumed, its export, old settings."""

import dataclasses
import json
import pydoc_data.topics

import pytest
import torch
from bert_batches import saved_bytes
from safetensors.torch import load_file

from fastbert import AlbertConfig, AlbertForPreTraining
from fastbert.data import load_tokenizer, open_stores
from fastbert.pretrain import presets, run, snapshot, step
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import read_metrics
from fastbert.pretrain.settings import PretrainConfig


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus") / "manual.txt"
    corpus.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:24]))
    return PretrainConfig(
        output=corpus, corpus=corpus, model="albert", tokenizer="unigram", masking="ngram", vocab_size=400, seq_len=32,
        batch_tokens=256, steps=9, lr=1e-3, held_out=0.2, evaluations=1, evaluation_batches=2, snapshot_every=4,
        log_every=1, linear="torch",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, output=tmp_path_factory.mktemp("run") / "whole")
    pretrain(config)
    return config.output


def records(folder):
    kept = ("step", "loss", "mlm_loss", "sop_loss", "gradient_norm", "held_out/sop_loss", "held_out/mlm_loss")
    return [{name: r[name] for name in kept if name in r} for r in read_metrics(folder / "metrics.jsonl")]


def test_killed_and_resumed_it_ends_in_the_same_bits(settings, finished, tmp_path, monkeypatch):
    config = dataclasses.replace(settings, output=tmp_path / "killed")
    take = step.train_step

    def killed_at_7(*arguments, **named):
        if arguments[6] == 7:
            raise KeyboardInterrupt
        return take(*arguments, **named)

    monkeypatch.setattr(step, "train_step", killed_at_7)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert snapshot.steps(config.output / "snapshots") == [4]
    monkeypatch.setattr(step, "train_step", take)
    pretrain(run.read_config(config.output), resume=True)
    assert records(config.output) == records(finished) and len(records(finished)) == 10
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (config.output, finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_export_is_read_by_transformers_with_its_tokenizer(finished):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    assert type(tokenizer).__name__ == "AlbertTokenizer"
    batch = dict(tokenizer(["The yield expression is used.", "A class."], padding=True, return_tensors="pt"))
    theirs = transformers.AlbertForPreTraining.from_pretrained(finished / "model").eval()(**batch)
    ours = AlbertForPreTraining.from_pretrained(finished / "model")(**batch)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.prediction_logits[seen], theirs.prediction_logits[seen], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sop_logits, theirs.sop_logits, rtol=0, atol=1e-4)
    own = load_tokenizer(finished / "model")
    assert own.encode("The yield expression is used.").ids == batch["input_ids"][0].tolist()
    assert open_stores(finished / "data")[0].vocab_size == len(tokenizer) == 400


def test_what_is_not_given_is_the_model_s_own(finished, settings):
    stored = json.loads((finished / "config.json").read_text())
    assert (stored["objective"], stored["dropout"]) == ("mlm+sop", 0.0)
    bert = run.with_choices(dataclasses.replace(settings, model="bert"))
    assert (bert.objective, bert.dropout) == ("mlm+nsp", 0.1)
    kept = run.with_choices(dataclasses.replace(settings, objective="mlm", dropout=0.2))
    assert (kept.objective, kept.dropout, kept.lr) == ("mlm", 0.2, 1e-3)
    with pytest.raises(ValueError, match=r"preset must be for model bert one of tiny, .*large, got 'xlarge'"):
        dataclasses.replace(settings, model="bert", preset="xlarge").check()


@pytest.mark.parametrize(
    ("model", "objective", "kind"), [("bert", "mlm+sop", "sop"), ("albert", "mlm+nsp", "nsp"), ("albert", "mlm", None)]
)
def test_every_objective_trains_every_model(settings, finished, tmp_path, capsys, model, objective, kind):
    config = dataclasses.replace(
        settings, output=tmp_path / "run", model=model, objective=objective, tokenizer="wordpiece", steps=2, bf16=True
    )
    pretrain(config)
    names = {name for record in read_metrics(config.output / "metrics.jsonl") for name in record}
    expected = {f"{part}{kind}_{name}" for part in ("", "held_out/") for name in ("loss", "accuracy") if kind}
    assert {name for name in names if "nsp" in name or "sop" in name} == expected
    said = capsys.readouterr().out
    assert ("sentence order: accuracy" in said, "next sentence: accuracy" in said) == (kind == "sop", kind == "nsp")
    assert f"transformers.{'Bert' if model == 'bert' else 'Albert'}ForPreTraining.from_pretrained loads it" in said


def test_settings_from_before_there_were_objectives_are_read(finished, tmp_path):
    stored = json.loads((finished / "config.json").read_text())
    for name in ("objective", "model", "tokenizer", "masking"):
        del stored[name]
    for nsp, objective in ((True, "mlm+nsp"), (False, "mlm")):
        (tmp_path / "config.json").write_text(json.dumps(stored | {"nsp": nsp}))
        config = run.read_config(tmp_path)
        assert (config.objective, config.model, config.tokenizer, config.masking) == (
            objective, "bert", "wordpiece", "token",
        )  # fmt: skip


def test_cost_of_a_step():
    """Memory is what autograd saves; operations by hand, for 1,000 tokens in sequences of 10, 150 of them predicted."""
    config = AlbertConfig.preset("mini", vocab_size=2000, num_hidden_groups=2)
    model = AlbertForPreTraining(config)
    counted = saved_bytes(model)
    assert presets.saved_for_backward(config, 1024) == pytest.approx(counted, rel=0.1)
    assert presets.parameters(config) == sum(param.numel() for param in model.parameters())

    config = AlbertConfig.preset("tiny", num_hidden_layers=1, inner_group_num=2, vocab_size=100)
    layer = 2 * 3 * 128 * 128 + 4 * 10 * 128, 2 * (128 * 128 + 2 * 128 * 512)  # projections and attention; the rest
    forward = 1000 * (2 * 64 * 128 + sum(layer) + layer[0]) + 150 * (layer[1] + 2 * (128 * 64 + 64 * 100))
    assert presets.operations(config, 1000, 1000 * 10, 150) == pytest.approx(3 * forward)
