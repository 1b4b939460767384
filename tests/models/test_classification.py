"""Classifiers: the numbers and folders of transformers, from encoders of every kind."""

import json

import pytest
import torch
from bert_batches import SMALL, B, batch, encoder_inputs, packed, unsettled

from fastbert import AlbertConfig, ErnieConfig, RobertaConfig, XLNetConfig
from fastbert.models.auto import ENCODERS
from fastbert.models.classification import CLASSIFIERS, BertForSequenceClassification

SIZES = {name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
                                                 "num_attention_heads", "initializer_range")}  # fmt: skip
CONFIGS = {
    "bert": SMALL,
    "albert": AlbertConfig(**SIZES, embedding_size=16, max_position_embeddings=16),
    "ernie": ErnieConfig(**SIZES, max_position_embeddings=16),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=0, type_vocab_size=2),
    "xlm-roberta": RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=0, type_vocab_size=2),
    "xlnet": XLNetConfig(**SIZES, pad_token_id=0),
}


def padded(kind: str) -> dict:
    """XLNet's pads on the left: transformers takes the last place for the summary."""
    made = batch()
    return made if kind != "xlnet" else made | {name: x.flip(1) for name, x in made.items() if x.dim() == 2}


WITHIN_THE_HEAD = "roberta", "xlm-roberta", "xlnet"  # there the pooler is


@pytest.mark.parametrize("labels", [("no", "yes", "perhaps"), ("score",)], ids=["classes", "a number"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_gives_the_same_numbers_and_folders_go_both_ways(transformers, tmp_path, kind, labels):
    torch.manual_seed(0)
    problem = "regression" if len(labels) == 1 else "single_label_classification"
    model = unsettled(CLASSIFIERS[kind](CONFIGS[kind], labels, problem)).eval()
    inputs = encoder_inputs(padded(kind))
    target = torch.tensor([0.5, -1.0, 2.0, 0.0]) if len(labels) == 1 else torch.tensor([0, 2, 1, 1])
    model.save_pretrained(tmp_path / "ours")
    theirs, report = getattr(transformers, type(model).__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    ours, expected = model(**inputs, labels=target), theirs(**inputs, labels=target)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**encoder_inputs(packed(padded(kind)))).logits, ours.logits, rtol=0, atol=1e-5)
    assert expected.logits.std() > 0.05 and list(theirs.config.id2label.values()) == list(labels)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = type(model).from_pretrained(tmp_path / "theirs")
    assert (loaded.labels, loaded.problem_type) == (labels, problem)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("pooler", [True, False])
def test_a_classifier_begins_with_the_encoder_s_weights(tmp_path, kind, pooler):
    encoder = unsettled(ENCODERS[kind](CONFIGS[kind], add_pooling_layer=pooler))
    model = CLASSIFIERS[kind].over(encoder, ("a", "b"), "single_label_classification")
    taken = model.base_model.state_dict()
    for name, x in encoder.state_dict().items():
        if not name.startswith("pooler.") or (pooler and kind not in WITHIN_THE_HEAD):
            assert torch.equal(taken[name], x), name


def test_roberta_drops_out_before_its_dense_layer_too():
    model = CLASSIFIERS["roberta"](CONFIGS["roberta"], ("a", "b"), classifier_dropout=0.5)
    assert [module.p for name, module in model.named_modules() if name.endswith("dropout")][-2:] == [0.5, 0.5]


def test_what_does_not_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"problem_type must be .* got 'multi_label_classification'"):
        BertForSequenceClassification(SMALL, ("a", "b"), "multi_label_classification")
    for labels, problem in ((["a"], "single_label_classification"), (["a", "a"], "single_label_classification"),
                            (["a", "b"], "regression")):  # fmt: skip
        with pytest.raises(ValueError, match="two or more names, for a regression one"):
            BertForSequenceClassification(SMALL, labels, problem)
    model = BertForSequenceClassification(SMALL, ("a", "b"))
    with pytest.raises(ValueError, match=rf"labels must have shape \[{B}\], got \[2\]"):
        model(**encoder_inputs(batch()), labels=torch.tensor([0, 1]))
    number = BertForSequenceClassification(SMALL, ("score",), "regression")
    with pytest.raises(TypeError, match=r"labels of a regression must be floating point, got torch\.int64"):
        number(**encoder_inputs(batch()), labels=torch.ones(B, dtype=torch.int64))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": ["a", "b"]}))
    with pytest.raises(ValueError, match="id2label must name a label for each number"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"classifier_dropout": "0.1"}))
    with pytest.raises(ValueError, match=r"expected None or a number from 0 to 1, got '0\.1'"):
        BertForSequenceClassification.from_pretrained(tmp_path)
