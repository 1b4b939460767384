"""Runs of XLNet: killed and resumed, the export, static shapes, and what is refused."""

import dataclasses

import pytest
import torch
from pretrain_runs import assert_same_run

from fastbert import XLNetLMHeadModel, attention_page
from fastbert.data import load_tokenizer
from fastbert.distill.intermediate import refuse_inside
from fastbert.embed import EmbedConfig, embed
from fastbert.fill import load_masked_lm
from fastbert.finetune.training import over_folder
from fastbert.pretrain import run, step
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import read_metrics

LETTERS = [letter * 4 for letter in "abcdefghijklmnopqrstuvwx"]


@pytest.fixture(scope="module")
def xlnet(settings, tmp_path_factory):
    """On texts that go round the alphabet: each word follows from any other and the distance to it."""
    corpus = tmp_path_factory.mktemp("letters") / "letters.txt"
    corpus.write_text("\n\n".join(
        " ".join(LETTERS[i % 24] for i in range(7 * text, 7 * text + 14 + text % 13)) for text in range(600)
    ))  # fmt: skip
    return dataclasses.replace(
        settings, corpus=corpus, model="xlnet", steps=40, snapshot_every=16, vocab_size=200, linear="torch"
    )


@pytest.fixture(scope="module")
def finished(xlnet, tmp_path_factory):
    config = dataclasses.replace(xlnet, output=tmp_path_factory.mktemp("run") / "whole")
    return pretrain(config).parent


def test_killed_and_resumed_it_ends_in_the_same_bits(xlnet, finished, tmp_path, monkeypatch):
    config = dataclasses.replace(xlnet, output=tmp_path / "killed")
    take = step.train_step

    def killed_at_20(*arguments, **named):
        if arguments[6] == 20:
            raise KeyboardInterrupt
        return take(*arguments, **named)

    monkeypatch.setattr(step, "train_step", killed_at_20)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.setattr(step, "train_step", take)
    pretrain(run.read_config(config.output), resume=True)
    assert_same_run(config.output, finished)
    scores = [record for record in read_metrics(finished / "metrics.jsonl") if "held_out/mlm_loss" in record]
    assert len(scores) == 2 and scores[-1]["held_out/mlm_accuracy"] > 0.5, "always one word: 0.04"


def test_the_export_is_read_by_transformers(transformers_quiet, finished, tmp_path):
    tokenizer = transformers_quiet.AutoTokenizer.from_pretrained(finished / "model")
    assert type(tokenizer).__name__ == "BertTokenizer" and tokenizer.padding_side == "left"
    batch = dict(tokenizer(["aaaa bbbb cccc", "xxxx."], padding=True, return_tensors="pt"))
    assert load_tokenizer(finished / "model").encode("xxxx.").ids == batch["input_ids"][1][-4:].tolist()
    theirs, report = transformers_quiet.XLNetLMHeadModel.from_pretrained(finished / "model", output_loading_info=True)
    assert not any(report.values()), report
    ours, seen = XLNetLMHeadModel.from_pretrained(finished / "model"), batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits
        torch.testing.assert_close(ours(**batch).logits[seen], expected[seen], rtol=0, atol=1e-4)


def test_static_shapes_and_layers_computed_again(xlnet, tmp_path):
    config = dataclasses.replace(xlnet, output=tmp_path / "a", steps=2, static_shapes=True, accumulate=2)
    again = dataclasses.replace(config, output=tmp_path / "b", checkpoint_layers=True)
    assert_same_run(pretrain(config).parent, pretrain(again).parent)


def test_what_goes_on_from_an_export(finished, tmp_path):
    """A classifier and vectors; gaps in the text are refused, and looks at attention's scores."""
    lines = tmp_path / "texts.txt"
    lines.write_text("aaaa bbbb cccc\nxxxx.\n")
    embed(EmbedConfig(finished / "model", lines, tmp_path / "of.npy"))
    model = over_folder(finished / "model", 0.2, ["no", "yes"], "single_label_classification", pairs=False)
    assert model.base_model.config.attention_probs_dropout_prob == 0.2
    assert type(model).__name__ == "XLNetForSequenceClassification"
    with pytest.raises(ValueError, match=r"an XLNet, which predicts words by queries .* has seen no \[MASK\]"):
        load_masked_lm(finished / "model")
    with pytest.raises(ValueError, match="an XLNet attends by relative positions, of which no page is made"):
        attention_page.probabilities(model.base_model, torch.full((1, 3), 7), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="whose scores are of relative positions too"):
        refuse_inside(model.base_model, "teacher")


def test_a_run_goes_on_from_an_export_in_bfloat16(xlnet, finished, tmp_path):
    again = dataclasses.replace(
        xlnet, output=tmp_path / "again", init=finished / "model", steps=1, vocab_size=8192, masking="span",
        batch_tokens=128, bf16=True,
        embedding_update="touched", dropout=0.0,
    )  # fmt: skip
    config = XLNetLMHeadModel.from_pretrained(pretrain(again)).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"objective": "mlm"}, "objective must be plm for model xlnet"),
     ({"model": "bert", "objective": "plm"}, r"objective must be one of mlm, .*, clm for model bert, got 'plm'"),
     ({"model": "roberta", "objective": "plm"}, "objective must be mlm or clm for model roberta"),
     ({"norm": "group"}, "norm must be left out for model xlnet"),
     ({"max_position_embeddings": 64}, "max_position_embeddings must be left out for model xlnet"),
     ({"attention_window": 8}, "attention_window must be left out for model xlnet"),
     ({"inputs": "full-sentences"}, "objective must be mlm or clm with inputs full-sentences"),
     ({"batch_tokens": 34}, "batch_tokens must be at least one sample's, of 32 tokens and 5 queries, got 34")],
)  # fmt: skip
def test_what_does_not_hold_is_refused(xlnet, tmp_path, changed, says):
    with pytest.raises(ValueError, match=says):
        pretrain(dataclasses.replace(xlnet, output=tmp_path / "run", **changed))
    assert not (tmp_path / "run" / "config.json").exists()
