"""Heads that read padding: an answer is sought among tokens, and labels at padding are refused."""

import pytest
import torch
from patched_models import CONFIGS, LENGTHS, MASK, S, batch, make
from torch.nn import functional as F

import fastbert

ANSWERS = {"start_positions": torch.tensor([1, 19, 0, 20]), "end_positions": torch.tensor([8, 19, 0, 30])}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_answer_is_sought_among_tokens(kind):
    """Loss and gradients are those of a softmax over tokens; answers behind the end of the batch are ignored."""
    model = make(kind, "AutoModelForQuestionAnswering", dropout=False, qa_dropout=0.0).train()
    inputs, found = batch(model), []
    for patched in (False, True):
        model.zero_grad()
        if patched:
            out = fastbert.patch(model)(**inputs, **ANSWERS)
            loss, logits = out.loss, (out.start_logits, out.end_logits)
        else:
            out = model(**inputs)
            logits = [x.masked_fill(MASK == 0, -1e4) for x in (out.start_logits, out.end_logits)]
            pairs = zip(logits, ANSWERS.values(), strict=True)
            loss = sum(F.cross_entropy(x[:3], at[:3]) for x, at in pairs) / 2
        loss.backward()
        found.append((loss, *logits, *(p.grad for p in model.parameters() if p.grad is not None)))
    torch.testing.assert_close(*reversed(found), atol=1e-4, rtol=0)
    first = model(**inputs, **ANSWERS, return_dict=False)
    torch.testing.assert_close(first[:3], found[1][:3])
    assert model(**inputs).loss is None


def test_an_answer_at_padding_is_refused():
    model = fastbert.patch(make("bert", "AutoModelForQuestionAnswering"))
    for name in ANSWERS:
        with pytest.raises(ValueError, match=r"1 answers start or end at padding, .* 20 \(the length of the batch\)"):
            model(**batch(model), **ANSWERS | {name: torch.where(torch.arange(4) == 3, LENGTHS, 0)})


def test_labels_of_tokens_at_padding_are_refused_in_training():
    model = fastbert.patch(make("bert", "AutoModelForTokenClassification")).train()
    labels = torch.arange(S).expand(MASK.shape) % 2
    with pytest.raises(ValueError, match="36 labels stand at padding"):
        model(**batch(model), labels=labels)
    assert model(**batch(model), labels=torch.where(MASK == 1, labels, -100)).loss > 0
    assert model.eval()(**batch(model), labels=labels).loss > 0
