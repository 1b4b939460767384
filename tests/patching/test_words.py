"""The masked word loss of a patched model, and its output."""

import pytest
import torch
from patched_models import CONFIGS, MASK, batch, make, word_labels
from torch.nn import functional as F

import fastbert


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_has_a_loss_and_no_logits(kind):
    """The loss is the mean over labelled places of the logits that evaluation gives; hidden states are there."""
    model = fastbert.patch(make(kind, "AutoModelForMaskedLM", dropout=False))
    inputs = batch(model)
    labels = word_labels(inputs)
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    evaluated = model(**inputs, labels=labels)
    torch.testing.assert_close(evaluated.loss, expected)
    assert torch.equal(evaluated.logits, logits)
    trained = model.train()(**inputs, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(trained.loss, expected)
    assert trained.logits is None and len(trained.hidden_states) == len(evaluated_states(model, inputs))
    (loss,) = model(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(**inputs).logits, logits)  # no labels, no loss: nothing is left out


def evaluated_states(model, inputs):
    return model.base_model(**inputs, output_hidden_states=True).hidden_states


def test_a_batch_without_labels_to_predict_moves_nothing():
    model = fastbert.patch(make("bert", "AutoModelForMaskedLM", dropout=False)).train()
    loss = model(**batch(model), labels=torch.full_like(MASK, -100)).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_labels_at_padding_are_refused():
    model = fastbert.patch(make("bert", "AutoModelForMaskedLM")).train()
    inputs = batch(model)
    with pytest.raises(ValueError, match=r"36 labels stand at padding, .* -100"):
        model(**inputs, labels=inputs["input_ids"])


def test_labels_that_are_not_one_a_token_are_refused():
    model = fastbert.patch(make("bert", "AutoModelForMaskedLM")).train()
    inputs = batch(model)
    with pytest.raises(ValueError, match=r"one for each token, shape \[4, 20\], got \[4, 19\]"):
        model(**inputs, labels=word_labels(inputs)[:, :19])


@pytest.mark.parametrize("kind", ["bert", "ernie", "albert"])
def test_beside_a_head_for_pairs(kind):
    """In training loss and gradients are those of transformers, with scores of pairs and without logits of words."""
    label = "sentence_order_label" if kind == "albert" else "next_sentence_label"
    scores = "sop_logits" if kind == "albert" else "seq_relationship_logits"
    theirs = make(kind, "AutoModelForPreTraining", dropout=False).train()
    ours = fastbert.patch(make(kind, "AutoModelForPreTraining", dropout=False)).train()
    inputs = batch(ours)
    labels = {"labels": word_labels(inputs), label: torch.tensor([0, 1, 1, 0])}
    expected, out = theirs(**inputs, **labels), ours(**inputs, **labels)
    expected.loss.backward()
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out[scores], expected[scores], rtol=1e-4, atol=1e-4)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert type(out) is type(expected) and out.prediction_logits is None
    alone = ours(**inputs, labels=labels["labels"])  # their loss is there with both labels only
    assert alone.loss is None and alone.prediction_logits.shape == (*MASK.shape, ours.config.vocab_size)
