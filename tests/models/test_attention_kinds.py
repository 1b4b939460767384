import dataclasses
import json

import pytest
import torch
import transformers

import fastbert
from fastbert.models.config import ModelConfig
from fastbert.pretrain.meter import visible_pairs

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KINDS = {
    "window": {"attention_window": 4},
    "window without a global token": {"attention_window": 4, "attention_global_first": False},
    "hard": {"attention_kind": "hard", "attention_temperature": 0.5},
    "gumbel in a window": {"attention_kind": "gumbel", "attention_window": 4},
}
BOUNDS = torch.tensor([0, 12, 12, 20], dtype=torch.int32)


def model_of(**fields):
    torch.manual_seed(0)
    return fastbert.BertModel(fastbert.BertConfig(**SMALL, **fields)).eval()


def encode(model, ids):
    return model(ids, cu_seqlens=BOUNDS, max_seqlen=12).sequence_output


@pytest.mark.parametrize("name", KINDS)
def test_is_saved_and_loaded(tmp_path, name):
    """And `transformers`, which would compute full soft attention, refuses the folder."""
    model, ids = model_of(**KINDS[name]), torch.randint(1, 50, (20,))
    model.save_pretrained(tmp_path)
    loaded = fastbert.AutoModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(encode(loaded, ids), encode(model, ids))
    with pytest.raises(ValueError, match="fastbert-bert"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_other_models_say_nothing_of_it(tmp_path):
    model_of().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "bert" and not any("window" in name or "kind" in name for name in fields)


def test_what_a_token_depends_on():
    """In one layer of window 4: two to each side, and the first token, which depends on all of its own sequence."""
    model = fastbert.BertModel(dataclasses.replace(model_of(**KINDS["window"]).config, num_hidden_layers=1)).eval()
    ids = torch.randint(1, 50, (20,))
    before = encode(model, ids)
    ids[6] = ids[6] % 49 + 1
    changed = (encode(model, ids) != before).any(1).nonzero().flatten().tolist()
    assert changed == [0, 4, 5, 6, 7, 8]


def test_gumbel_noise_in_training_is_recomputed_alike():
    """Layers that are computed again for backward draw the same noise; evaluation draws none."""
    ids, gradients = torch.randint(1, 50, (20,)), []
    for again in (False, True):
        model = model_of(**KINDS["gumbel in a window"]).train()
        model.checkpoint_layers = again
        torch.manual_seed(5)
        encode(model, ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.manual_seed(6)
    other = encode(model, ids)
    assert not torch.equal(encode(model, ids), other)
    assert torch.equal(encode(model.eval(), ids), encode(model, ids))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 4, 6, 60])
def test_pairs_that_count_as_work(window, causal):
    lengths = torch.tensor([0, 1, 3, 4, 12])
    config = fastbert.BertConfig(attention_window=window, is_decoder=causal)
    expected = []
    for n in lengths.tolist():
        ahead = torch.arange(n) - torch.arange(n).unsqueeze(1)
        seen = (ahead.abs() <= window // 2) & ((ahead <= 0) if causal else True)
        if not causal:
            seen[:1], seen[:, :1] = True, True
        expected.append(int(seen.sum()))
    assert visible_pairs(lengths, config).tolist() == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_window": 3}, "attention_window must be None or an even int of at least 0"),
        ({"attention_window": True}, "attention_window must be None or an even int of at least 0"),
        ({"attention_kind": "best"}, "attention_kind must be one of soft, hard, gumbel, got 'best'"),
        ({"attention_temperature": 0.0}, "attention_temperature must be a number above 0"),
        ({"attention_kind": "hard", "attention_probs_dropout_prob": 0.1}, "has no weights to drop"),
        ({"attention_global_first": 1}, "attention_global_first must be True or False"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
