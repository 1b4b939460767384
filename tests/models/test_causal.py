"""A decoder: tokens see none of those behind them, here as in transformers."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from fastbert.models.albert import AlbertConfig
from fastbert.models.bert import BertConfig, BertForPreTraining

CONFIG = BertConfig.preset("tiny", vocab_size=90, max_position_embeddings=32, is_decoder=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BertForPreTraining(CONFIG).eval()


def test_nothing_behind_a_token_is_seen(model):
    """Two packed sequences of 9 and 5; the third token from the end of each changes."""
    ids = torch.arange(14) + 5
    cu = torch.tensor([0, 9, 14], dtype=torch.int32)
    changed = ids.clone()
    changed[[6, 11]] = 80
    logits, others = (model(x, cu_seqlens=cu, max_seqlen=9).prediction_logits for x in (ids, changed))
    same = (logits == others).all(1)
    assert same.tolist() == [True] * 6 + [False] * 3 + [True] * 2 + [False] * 3
    both = BertForPreTraining(dataclasses.replace(CONFIG, is_decoder=False)).eval()
    both.load_state_dict(model.state_dict())
    assert not torch.equal(both(ids, cu_seqlens=cu, max_seqlen=9).prediction_logits[0], logits[0])


def test_an_export_predicts_the_same_next_tokens_in_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_decoder"] is True
    theirs = transformers.BertLMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = BertForPreTraining.from_pretrained(tmp_path)
    assert ours.config == CONFIG
    ids = torch.randint(5, 90, (3, 20))
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(ours(ids).prediction_logits, logits, atol=1e-5, rtol=1e-4)
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(ours(ids, labels=labels).mlm_loss, expected, atol=1e-5, rtol=1e-4)


def test_albert_is_none():
    with pytest.raises(ValueError, match="this ALBERT has is_decoder = False only"):
        AlbertConfig.preset("tiny", is_decoder=True)
