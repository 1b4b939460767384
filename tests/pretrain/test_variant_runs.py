"""Runs of RoBERTa and ERNIE from raw text: what is trained, and what transformers reads of the export."""

import dataclasses
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastbert.data import load_tokenizer, open_stores
from fastbert.models.auto import PRETRAINING
from fastbert.models.layers import MultiHeadAttention
from fastbert.pretrain import run
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import read_metrics

TEXTS = ["The yield expression is used when defining a generator.", "A class."]


@pytest.mark.parametrize(
    ("model", "kind", "tokenizer", "losses"),
    [("roberta", "RobertaForMaskedLM", "RobertaTokenizer", set()),
     ("ernie", "ErnieForPreTraining", "BertTokenizer",
      {"nsp_loss", "nsp_accuracy", "held_out/nsp_loss", "held_out/nsp_accuracy"})],
)  # fmt: skip
def test_raw_text_becomes_a_folder_of_transformers(settings, tmp_path, capsys, model, kind, tokenizer, losses):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = dataclasses.replace(
        settings, output=tmp_path / "run", model=model, lowercase=model == "ernie", steps=4, masking="ngram",
        max_position_embeddings=32,
    )  # fmt: skip
    folder = pretrain(config)
    names = {name for record in read_metrics(config.output / "metrics.jsonl") for name in record}
    assert {name for name in names if "nsp" in name or "sop" in name} == losses
    assert f"transformers.{kind}.from_pretrained loads it" in capsys.readouterr().out

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == tokenizer
    batch = dict(theirs(TEXTS, padding=True, return_tensors="pt"))
    assert load_tokenizer(folder).encode(TEXTS[0]).ids == batch["input_ids"][0].tolist()
    assert open_stores(config.output / "data")[0].vocab_size == len(theirs) == 1000
    model_of_theirs, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = model_of_theirs.eval()(**batch)
    ours = PRETRAINING[model].from_pretrained(folder)(**batch)
    seen = batch["attention_mask"].bool()
    logits = expected.logits if model == "roberta" else expected.prediction_logits
    torch.testing.assert_close(ours.prediction_logits[seen], logits[seen], rtol=0, atol=1e-4)
    longest = theirs("word " * 100, truncation=True, return_tensors="pt")["input_ids"]
    assert longest.shape == (1, 32), "as many tokens as the setting says"
    PRETRAINING[model].from_pretrained(folder)(longest)


def test_what_is_not_given_is_the_model_s_own(settings):
    chosen = {
        model: run.with_choices(dataclasses.replace(settings, model=model, linear="torch"))
        for model in ("roberta", "ernie", "albert")
    }
    assert {model: (c.objective, c.tokenizer, c.dropout) for model, c in chosen.items()} == {
        "roberta": ("mlm", "bpe", 0.1), "ernie": ("mlm+nsp", "wordpiece", 0.1), "albert": ("mlm+sop", "wordpiece", 0.0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"objective must be mlm or clm for model roberta, .* got 'mlm\+sop'"):
        dataclasses.replace(settings, model="roberta", objective="mlm+sop").check()
    with pytest.raises(ValueError, match="tokenizer must be one of wordpiece, unigram, bpe, got 'words'"):
        dataclasses.replace(settings, tokenizer="words").check()


def test_an_ernies_task_types_go_through_to_the_export(settings, tmp_path, transformers_quiet):
    """A run is one task; a second on the same model is another, and moves its own row of the embedding."""
    config = dataclasses.replace(
        settings, output=tmp_path / "first", model="ernie", steps=3, objective="mlm", task_type=2, weight_decay=0.0,
        static_shapes=True,
    )  # fmt: skip
    folder = pretrain(config)
    model, report = transformers_quiet.ErnieForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert model.config.use_task_id and model.config.task_type_vocab_size == 3 and not any(report.values()), report
    ids = torch.tensor([load_tokenizer(folder).encode(TEXTS[0]).ids])
    tasks = torch.full_like(ids, 2)
    with torch.no_grad():
        theirs = model.eval()(ids, task_type_ids=tasks).prediction_logits
        ours = PRETRAINING["ernie"].from_pretrained(folder)
        torch.testing.assert_close(ours(ids, task_type_ids=tasks).prediction_logits, theirs, rtol=0, atol=1e-4)
        assert (ours(ids).prediction_logits - theirs).abs().max() > 1e-4, "task type 0 is another"

    again = dataclasses.replace(config, output=tmp_path / "again", init=folder, task_type=1, vocab_size=8192)
    again = dataclasses.replace(again, model="bert", max_position_embeddings=512, lr=1e-3)
    rows = [
        PRETRAINING["ernie"].from_pretrained(at).base_model.embeddings.task_type_embeddings.weight
        for at in (folder, pretrain(again))
    ]
    assert [not torch.equal(*pair) for pair in zip(*rows, strict=True)] == [False, True, False]

    plain = pretrain(dataclasses.replace(config, output=tmp_path / "plain", task_type=None, steps=1))
    assert not PRETRAINING["ernie"].from_pretrained(plain).config.use_task_id
    with pytest.raises(ValueError, match=r"has no task types \(use_task_id\): leave --task-type out"):
        pretrain(dataclasses.replace(again, output=tmp_path / "none", init=plain))
    for change, says in (
        ({"task_type": 3}, "task_type must be an integer from 0 to 2, got 3"),
        ({"model": "bert"}, "task_type must be left out but for model ernie, which has task types, got 2"),
    ):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(config, **change).check()


def test_a_run_with_a_window(settings, tmp_path, capsys):
    """Its export says which library loads it, and further runs keep the window."""
    config = dataclasses.replace(settings, output=tmp_path / "run", steps=2, attention_window=8)
    folder = pretrain(config)
    assert "fastbert loads it; transformers cannot, as it has no window of attention" in capsys.readouterr().out
    model = PRETRAINING["bert"].from_pretrained(folder)
    assert model.config.attention_window == 8 and model.config.attention_global_first
    again = dataclasses.replace(settings, output=tmp_path / "again", init=folder, steps=1, vocab_size=8192)
    assert PRETRAINING["bert"].from_pretrained(pretrain(again)).config.attention_window == 8
    for changed, rule in (
        ({"attention_window": 7}, "attention_window must be even, half of it to each side, got 7"),
        ({"attention_window": -2}, "attention_window must be"),
        ({"init": folder, "vocab_size": 8192}, "decides --attention-window"),
    ):
        with pytest.raises(ValueError, match=rule):
            pretrain(dataclasses.replace(config, output=tmp_path / "refused", **changed))


def test_a_run_with_hard_attention(settings, tmp_path, monkeypatch):
    """Its temperature is a function of the step, also behind a stop and in micro-batches; the folder keeps the kind."""
    config = dataclasses.replace(
        settings, output=tmp_path / "run", steps=4, snapshot_every=2, attention_kind="gumbel", dropout=0.0,
        attention_temperature=2.0, attention_temperature_rate=0.5, accumulate=2,
    )  # fmt: skip
    seen = []

    def noted(self, *arguments):
        if self.training:
            seen.append(self.temperature)
        return forward(self, *arguments)

    forward = MultiHeadAttention.forward
    monkeypatch.setattr(MultiHeadAttention, "forward", noted)
    folder = pretrain(config)
    expected = [max(0.5, 2.0 * math.exp(-0.5 * n)) for n in range(4)]
    each = len(seen) // 4  # layers, times micro-batches
    assert seen == [x for x in expected for _ in range(each)] and each >= 4
    trained = load_file(folder / "model.safetensors")
    assert PRETRAINING["bert"].from_pretrained(folder).config.attention_kind == "gumbel"

    seen.clear()
    shutil.rmtree(folder)
    shutil.rmtree(sorted((tmp_path / "run/snapshots").iterdir())[-1])  # back to step 2
    again = load_file(pretrain(config, resume=True) / "model.safetensors")
    assert seen == [x for x in expected[2:] for _ in range(each)]
    assert all(torch.equal(again[name], x) for name, x in trained.items())

    further = dataclasses.replace(settings, output=tmp_path / "further", init=folder, steps=1, vocab_size=8192)
    further = dataclasses.replace(further, dropout=None)
    model = PRETRAINING["bert"].from_pretrained(pretrain(further))
    assert (model.config.attention_kind, model.config.attention_temperature) == ("gumbel", 2.0)
    for base, changed, rule in (
        (config, {"dropout": None}, r"dropout must be 0 \(--dropout 0\) with attention_kind gumbel, .* got 0.1"),
        (config, {"attention_temperature_end": 3.0}, "attention_temperature_end must be at most attention_temperature"),
        (config, {"attention_kind": "soft"}, "attention_temperature must be left out with attention_kind soft"),
        (config, {"attention_kind": "best"}, "attention_kind must be one of soft, hard, gumbel, got 'best'"),
        (further, {"dropout": 0.1}, r"dropout must be 0 \(--dropout 0\) with attention_kind gumbel"),
        (further, {"attention_kind": "hard"}, "decides --attention-kind"),
    ):
        with pytest.raises(ValueError, match=rule):
            pretrain(dataclasses.replace(base, output=tmp_path / "refused", **changed))
    assert not (tmp_path / "refused").exists()
