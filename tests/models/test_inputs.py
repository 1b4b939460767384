"""BERT: configurations and batches that fit, and what is said of those that do not."""

import math

import pytest
import torch
from bert_batches import SMALL, B, S, V, batch, packed

from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel

# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "inner"),
    [
        ("tiny", 2, 128, 2, 512),
        ("mini", 4, 256, 4, 1024),
        ("small", 4, 512, 8, 2048),
        ("base", 12, 768, 12, 3072),
        ("large", 24, 1024, 16, 4096),
    ],
)
def test_presets(name, layers, hidden, heads, inner):
    config = BertConfig.preset(name, vocab_size=7)
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    assert (*sizes, config.vocab_size) == (layers, hidden, heads, inner, 7)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'huge'.*tiny, mini, small, base, large"):
        BertConfig.preset("huge")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 30, "multiple of num_attention_heads"),
        ("vocab_size", 0, "vocab_size must be an int of at least 1"),
        ("num_hidden_layers", 2.0, "num_hidden_layers must be an int"),
        ("hidden_dropout_prob", 1.5, "probability"),
        ("layer_norm_eps", math.nan, "finite"),
        ("initializer_range", None, "initializer_range must be a number.* got None"),
        ("layer_norm_eps", "1e-12", "layer_norm_eps must be a number.* got '1e-12'"),
        ("attention_probs_dropout_prob", "0.1", "probability: expected a number.* got '0.1'"),
        ("attention_probs_dropout_prob", False, "probability.* got False"),
        ("num_attention_heads", True, "num_attention_heads must be an int of at least 1, got True"),
        ("hidden_act", ["gelu"], "hidden_act must be one of"),
        ("pad_token_id", "0", "pad_token_id must be None or an id.* got '0'"),
        ("hidden_act", "relu", "gelu, gelu_python, gelu_new"),
        ("pad_token_id", V, "pad_token_id"),
    ],
)
def test_a_configuration_no_bert_can_have_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{"hidden_size": 32, "num_attention_heads": 4, "vocab_size": V, field: value})


def test_base_has_110_million_parameters():
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig())
    assert sum(p.numel() for p in model.parameters()) == 110_106_428  # what transformers counts, the decoder tied


def test_initial_weights():
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=3000, initializer_range=0.02))
    words = model.bert.embeddings.word_embeddings.weight
    assert words[0].abs().max() == 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10_000:
            assert abs(parameter.std().item() / 0.02 - 1) < 0.03, name


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.full((B, S), V)}, ValueError, rf"input_ids must lie in \[0, {V}\).*vocab_size"),
        ({"input_ids": torch.full((B, S), -1)}, ValueError, "from -1 to -1"),
        ({"input_ids": torch.zeros(B, S)}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        ({"token_type_ids": torch.full((B, S), 2)}, ValueError, "token_type_ids.*type_vocab_size"),
        (
            {"token_type_ids": torch.zeros(B, 1, dtype=torch.long)},
            ValueError,
            r"token_type_ids must have shape \[4, 12",
        ),
        ({"position_ids": torch.full((B, S), 16)}, ValueError, "position_ids.*max_position_embeddings"),
        ({"position_ids": torch.zeros(3, S, dtype=torch.long)}, ValueError, r"position_ids must have shape \[4, 12\]"),
        ({"attention_mask": torch.zeros(B, S)}, TypeError, "bool or integer.*mask == 0"),
        (
            {"attention_mask": torch.ones(B, 3, dtype=torch.long)},
            ValueError,
            "attention_mask must have input_ids' shape",
        ),
        ({"labels": torch.full((B, S), V)}, ValueError, "labels must lie in"),
        ({"labels": torch.full((B, S), -1)}, ValueError, "or be -100 to be ignored; got -1"),
        ({"labels": torch.zeros(B, 2, dtype=torch.long)}, ValueError, "labels must have shape"),
        ({"labels": torch.zeros(B, S)}, TypeError, "labels must be int64"),
        ({"next_sentence_label": torch.full((B,), 2)}, ValueError, r"next_sentence_label must lie in \[0, 2\)"),
        ({"next_sentence_label": torch.zeros(3, dtype=torch.long)}, ValueError, r"must have shape \[4\]"),
        ({"masked_positions": torch.zeros(2)}, ValueError, "masked_positions must be int64"),
        ({"masked_positions": torch.tensor([B * S])}, ValueError, r"masked_positions must lie in \[0, 48\)"),
    ],
)
def test_bad_padded_input_gets_a_sentence(change, error, message):
    with pytest.raises(error, match=message):
        BertForPreTraining(SMALL)(**batch() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 12, 19, 22, 23])}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0, 12, 19, 22, 24], dtype=torch.int32)}, "end at the number of tokens, 23"),
        ({"cu_seqlens": torch.tensor([0, 12, 7, 22, 23], dtype=torch.int32)}, "never decrease"),
        ({"max_seqlen": 11}, "longest sequence has 12"),
        ({"max_seqlen": 17}, "17 tokens, but the position table"),
        ({"input_ids": torch.zeros(1, 23, dtype=torch.long)}, r"packed \[T\]"),
        ({"attention_mask": torch.ones(23, dtype=torch.long)}, "leave attention_mask out"),
        ({"masked_positions": torch.tensor([23] * 9)}, r"must lie in \[0, 23\)"),
    ],
)
def test_bad_packed_input_gets_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        BertForPreTraining(SMALL)(**packed(batch()) | change)


@pytest.mark.parametrize("shape", [(S,), (2, 2, 2), (2, 0)])
def test_ids_of_another_rank_without_cu_seqlens(shape):
    with pytest.raises(ValueError, match=r"\[B, S\] with S >= 1, or packed \[T\] together with cu_seqlens"):
        BertModel(SMALL)(torch.zeros(shape, dtype=torch.long))


def test_a_sequence_longer_than_the_position_table_says_what_to_do():
    with pytest.raises(ValueError, match=r"17 tokens.*max_position_embeddings.* holds 16: truncate"):
        BertModel(SMALL)(torch.zeros(2, 17, dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tracing
def test_tracing_is_refused():
    """Traced, the lengths of one batch would be those of all."""
    model = BertModel(SMALL).eval()
    with pytest.raises(RuntimeError, match=r"use torch\.compile or torch\.export"):
        torch.jit.trace(lambda ids: model(ids).sequence_output, (torch.ones(2, 8, dtype=torch.long),))


def test_masks_of_another_kind_are_told_apart():
    """Advice for an additive mask would turn one of ones and zeros around."""
    model = BertModel(SMALL)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"ones and zeros becomes one by `mask\.bool\(\)`, an additive one"):
        model(ids, torch.ones(1, 3))
    for wrong, name in (([[1, 2]], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"input_ids must be a torch\.Tensor, got {name}"):
            model(wrong)
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor, got list"):
        model(ids, [[1, 1, 1]])
