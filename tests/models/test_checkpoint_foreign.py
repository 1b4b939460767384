"""Folders that other programs wrote: what transformers loads loads here, and what cannot says why."""

import json

import pytest
import safetensors.torch
import torch

from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel

CONFIG = BertConfig(60, 16, 2, 2, 32, max_position_embeddings=12)
TABLE, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
QUERY = "bert.encoder.layer.0.attention.self.query"
IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    model = BertForPreTraining(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and LayerNorms too: nothing must hide behind 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = change(safetensors.torch.load_file(folder / "model.safetensors"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, without=(), **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({n: x for n, x in config.items() if n not in without}))


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def prefixed(prefix):
    return lambda tensors: {prefix + name: x for name, x in tensors.items()}


def decoder_alone(tensors):
    return without(TABLE)(tensors) | {DECODER: tensors[TABLE]}


def encoder_alone(tensors):
    return {name.removeprefix("bert."): x for name, x in tensors.items() if name.startswith("bert.")}


def theirs(cls, folder):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, cls).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def assert_equal_to_transformers(folder):
    whole = theirs("BertForPreTraining", folder)
    ours, expected = BertForPreTraining.from_pretrained(folder)(IDS), whole(IDS)
    torch.testing.assert_close(ours.prediction_logits, expected.prediction_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.seq_relationship_logits, expected.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    ours, expected = BertModel.from_pretrained(folder)(IDS), whole.bert(IDS)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"hidden_act": "gelu_python"}, None),
        ({"hidden_act": "gelu_fast"}, None),
        ({"hidden_act": "gelu_accurate"}, None),
        ({"pruned_heads": {}}, None),
        ({}, decoder_alone),
        ({}, lambda t: t | {TABLE: t[TABLE].half(), DECODER: t[TABLE].half().float()}),
        ({}, lambda t: t | {"cls.predictions.decoder.bias": t["cls.predictions.bias"].clone()}),
        ({"tie_word_embeddings": False}, lambda t: t | {DECODER: t[TABLE].clone(),
                                                        "cls.predictions.decoder.bias": t["cls.predictions.bias"] + 0}),
    ],
    ids=["gelu_python", "gelu_fast", "gelu_accurate", "no heads pruned", "table stored as the decoder",
         "float16 table, float32 decoder", "bias twice", "untied, but equal"],
)  # fmt: skip
def test_what_transformers_loads_gives_its_numbers(folder, fields, change):
    set_config(folder, **fields)
    if change:
        rewrite(folder, change)
    assert_equal_to_transformers(folder)


def test_an_old_configuration_does_not_name_its_kind(folder):
    set_config(folder, without=("model_type", "architectures", "position_embedding_type"))
    ours, expected = BertModel.from_pretrained(folder)(IDS), theirs("BertModel", folder)(IDS)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_an_encoder_without_a_decoder_needs_no_tie(folder):
    set_config(folder, tie_word_embeddings=False, architectures=["BertModel"])
    rewrite(folder, encoder_alone)
    ours, expected = BertModel.from_pretrained(folder)(IDS), theirs("BertModel", folder)(IDS)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.", "0.auto_model."])
@pytest.mark.parametrize("whole", [True, False])
def test_a_wrapper_s_prefix_is_no_part_of_the_names(model, folder, prefix, whole):
    if not whole:
        rewrite(folder, encoder_alone)
    rewrite(folder, prefixed(prefix))
    loaded = BertForPreTraining.from_pretrained(folder) if whole else BertModel.from_pretrained(folder)
    expected = model.state_dict() if whole else model.bert.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())


def test_a_decoder_rounded_to_the_table_s_dtype_counts_as_tied(model, folder):
    rewrite(folder, lambda t: t | {TABLE: t[TABLE].half(), DECODER: t[TABLE]})
    table = BertForPreTraining.from_pretrained(folder).word_embeddings
    assert torch.equal(table, model.word_embeddings.half().float())


def scaled(dtype, name):
    """The query's weight quantised to `dtype`, with its scale under `name` (None: thrown away)."""

    def change(tensors):
        weight = tensors[f"{QUERY}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 100
        tensors[f"{QUERY}.weight"] = (weight / scale).to(dtype)
        return tensors | ({f"{QUERY}.{name}": scale} if name else {})

    return change


@pytest.mark.parametrize("cls", [BertModel, BertForPreTraining])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled(torch.int8, None), r"query\.weight is torch\.int8, a quantised weight"),
        (scaled(torch.int8, "SCB"), r"query\.weight is torch\.int8, a quantised weight"),
        (scaled(torch.float8_e4m3fn, "weight_scale"), r"query\.weight is torch\.float8_e4m3fn, a quantised weight"),
        (scaled(torch.float32, "weight_scale_inv"), r"has .*query\.weight_scale_inv beside a weight"),
        (lambda t: t | {f"{QUERY}.lora_A.weight": torch.ones(4, 16)}, r"has .*query\.lora_A\.weight beside a weight"),
        (lambda t: decoder_alone(t) | {DECODER: t[TABLE].to(torch.int8)}, r"decoder\.weight is torch\.int8"),
    ],
)
def test_quantised_and_adapted_weights_are_refused(folder, cls, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [TABLE, DECODER, f"{QUERY}.bias", "cls.predictions.bias"])
def test_weights_that_are_not_finite_are_named(folder, name, value):
    def poison(tensors):
        tensors = tensors | {DECODER: tensors[TABLE].clone()}
        tensors[name].view(-1)[5] = value
        return tensors

    rewrite(folder, poison)
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity: its training diverged"):
        BertForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440449768\n")
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer, not the file itself: run `git lfs install"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "expected tensors by name, got list"), ({"epoch": 3}, "expected tensors by name, 'epoch' is int")],
)
def test_a_pickle_of_something_else_is_named(folder, content, message):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin is no plain state dict: {message}"):
        BertModel.from_pretrained(folder)


def test_another_model_s_weights_under_a_nameless_configuration_are_refused(folder):
    set_config(folder, without=("model_type", "architectures"))
    rewrite(folder, lambda tensors: prefixed("roberta.")(encoder_alone(tensors)))
    with pytest.raises(ValueError, match=r"names no \"model_type\" and the weights stand under 'roberta\.'"):
        BertModel.from_pretrained(folder)


def test_two_tensors_for_one_parameter_and_two_encoders_are_refused(folder):
    rewrite(folder, lambda t: t | {"bert.embeddings.LayerNorm.gamma": torch.ones(16)})
    with pytest.raises(ValueError, match=r"two tensors for bert\.embeddings\.LayerNorm\.weight"):
        BertModel.from_pretrained(folder)
    rewrite(folder, lambda t: {"query." + n: x for n, x in t.items()} | {"passage." + n: x + 0 for n, x in t.items()})
    with pytest.raises(ValueError, match=r"holds 2 encoders, under '(query|passage)\.bert\.', "):
        BertModel.from_pretrained(folder)
