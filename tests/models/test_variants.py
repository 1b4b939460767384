"""BERT, RoBERTa and ERNIE: the numbers of transformers for every form of a batch, and folders both ways."""

import json

import pytest
import safetensors.torch
import torch
from bert_batches import B, S, V, batch, packed, unsettled

import fastbert
from fastbert import (
    AutoModel,
    BertConfig,
    BertForPreTraining,
    ErnieConfig,
    ErnieForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

SIZES = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.2,
}  # fmt: skip
ROBERTA = RobertaConfig(**SIZES, max_position_embeddings=S + 4, pad_token_id=3, type_vocab_size=2)
ERNIE = ErnieConfig(**SIZES, max_position_embeddings=S, type_vocab_size=4, use_task_id=True)
MODELS = {
    "bert": (BertForPreTraining, BertConfig(**SIZES, max_position_embeddings=S), "BertForPreTraining"),
    "roberta": (RobertaForMaskedLM, ROBERTA, "RobertaForMaskedLM"),
    "roberta, other GELU": (
        RobertaForMaskedLM, RobertaConfig(**vars(ROBERTA) | {"hidden_act": "gelu_new"}), "RobertaForMaskedLM"
    ),
    "xlm-roberta": (fastbert.XLMRobertaForMaskedLM, ROBERTA, "XLMRobertaForMaskedLM"),
    "ernie": (ErnieForPreTraining, ERNIE, "ErnieForPreTraining"),
    "ernie, words alone": (ErnieForPreTraining, ERNIE, "ErnieForMaskedLM"),
    "ernie, no tasks": (
        ErnieForPreTraining, ErnieConfig(**vars(ERNIE) | {"use_task_id": False}), "ErnieForPreTraining"
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    cls, config, theirs = MODELS[request.param]
    torch.manual_seed(0)
    return unsettled(cls(config).eval()), theirs


def batch_of(model, their_class: str, left: bool) -> dict:
    """A batch of padded sequences with all that the model takes; padding has the padding id, and stands on either side.

    With padding on the left transformers pools that in place of the first token: no question about pairs then.
    """
    made = batch(lengths=[S - 2, 7, 3, 1])
    made["input_ids"][made["input_ids"] == model.config.pad_token_id] = 5
    made["input_ids"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, model.config.pad_token_id)
    made["labels"] = torch.where(made["labels"] == -100, -100, made["input_ids"])
    if getattr(model.config, "use_task_id", False):
        made["task_type_ids"] = torch.arange(S).expand(B, S) % 3
    if "PreTraining" not in their_class or left:
        del made["next_sentence_label"]
    if left:
        made |= {name: x.flip(1) for name, x in made.items() if x.dim() == 2}
    return made


def in_form(padded: dict, form: str) -> dict:
    if form != "packed":
        return padded
    made = packed(padded | {"next_sentence_label": padded.get("next_sentence_label")})
    real = padded["attention_mask"].bool()
    more = {"task_type_ids": padded["task_type_ids"][real]} if "task_type_ids" in padded else {}
    return {name: x for name, x in made.items() if x is not None} | more


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@torch.no_grad()
def test_transformers_gives_the_same_numbers(transformers, case, tmp_path, form):
    model, their_class = case
    model.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, their_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    inputs = batch_of(model, their_class, left=form == "left")
    ours, expected = model(**in_form(inputs, form)), theirs(**inputs)
    logits = getattr(expected, "prediction_logits", getattr(expected, "logits", None))
    if expected.loss is not None:  # it needs the labels of all heads
        torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.prediction_logits, logits[inputs["labels"] != -100], rtol=0, atol=1e-4)
    assert logits.std() > 0.1, "the numbers are too alike to tell two models apart"
    if "next_sentence_label" in inputs:
        torch.testing.assert_close(ours.sentence_logits, expected.seq_relationship_logits, rtol=0, atol=1e-4)

    encoder = getattr(transformers, model.names.title + "Model").from_pretrained(tmp_path)
    wanted = [name for name in inputs if name.endswith("_ids") or name == "attention_mask"]
    expected = encoder(**{name: inputs[name] for name in wanted}).last_hidden_state
    given = in_form(inputs, form)
    ours = model.base_model(**{name: x for name, x in given.items() if name in (*wanted, "cu_seqlens", "max_seqlen")})
    real = inputs["attention_mask"].bool()
    hidden = ours.last_hidden_state if form == "packed" else ours.last_hidden_state[real]
    torch.testing.assert_close(hidden, expected[real], rtol=0, atol=1e-4)


def test_folders_of_transformers_are_read(transformers, case, tmp_path):
    model, their_class = case
    model.save_pretrained(tmp_path / "ours")
    whole = getattr(transformers, their_class).from_pretrained(tmp_path / "ours")
    whole.save_pretrained(tmp_path / "theirs")
    if their_class == "ErnieForMaskedLM":
        with pytest.warns(UserWarning, match=r"lacks ernie\.pooler\.dense\.weight, .*seq_relationship.*: newly init"):
            loaded = ErnieForPreTraining.from_pretrained(tmp_path / "theirs")
        assert torch.equal(loaded.predictions.bias, model.predictions.bias)
    else:
        loaded = type(model).from_pretrained(tmp_path / "theirs")
        assert same(loaded, model)
    assert loaded.config == model.config

    encoder = getattr(transformers, model.names.title + "Model").from_pretrained(tmp_path / "ours")
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "encoder")
    assert type(loaded) is type(model).encoder_class and loaded.pooler is not None
    theirs = {name: x for name, x in loaded.state_dict().items() if "pooler" not in name}
    ours = model.base_model.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in theirs.items())
    with pytest.warns(UserWarning, match="newly initialised"):  # the heads
        fresh = type(model).from_pretrained(tmp_path / "encoder")
    theirs = {name: x for name, x in fresh.base_model.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(x, ours[name]) for name, x in theirs.items())
    assert same(AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False), strip_pooler(model))
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "ours")) is type(encoder)
    assert (
        type(transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "ours")).__name__ == type(model).__name__
    )


def strip_pooler(model):
    model.base_model.pooler = None
    return model.base_model


def test_old_names_wrappers_and_an_explicit_decoder_are_read(case, tmp_path):
    model, _ = case
    model.save_pretrained(tmp_path)
    head = model.names.predictions

    def aged(name: str) -> str:
        for norm in ("LayerNorm", "layer_norm"):
            name = name.replace(f"{norm}.weight", f"{norm}.gamma").replace(f"{norm}.bias", f"{norm}.beta")
        return f"module.{name}"

    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not any("decoder" in name or "qkv" in name for name in tensors)
    tensors[f"{model.names.base}embeddings.position_ids"] = torch.arange(9)[None]
    tensors[f"{head}decoder.weight"] = tensors[model.names.embedding].clone()
    tensors[f"{head}decoder.bias"] = tensors.pop(f"{head}bias")
    safetensors.torch.save_file({aged(name): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    assert same(type(model).from_pretrained(tmp_path), model)


def test_roberta_counts_positions_from_behind_the_padding_id(tmp_path):
    """Of [5, 6, pad, 7]: 4, 5, padding's own 3, and 6, in whatever form the batch comes."""
    model = unsettled(RobertaModel(ROBERTA).eval())
    ids = torch.tensor([[5, 6, 3, 7], [3, 3, 8, 9]])
    places = torch.tensor([[4, 5, 3, 6], [3, 3, 4, 5]])
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    expected = model(ids, position_ids=places).sequence_output
    assert torch.equal(model(ids).sequence_output, expected)
    assert torch.equal(model(ids.flatten(), cu_seqlens=cu_seqlens).sequence_output.view(2, 4, -1), expected)
    assert not torch.equal(model(ids, position_ids=places - 1).sequence_output, expected)
    assert model(torch.full((1, S), 9)).sequence_output.shape == (1, S, 32)
    with pytest.raises(ValueError, match=rf"a sequence has {S + 1} tokens, but the position table .* holds {S}"):
        model(torch.full((1, S + 1), 9))
    table = RobertaModel(ROBERTA).embeddings.position_embeddings
    assert table.padding_idx == 3 and not table.weight[3].any()


def test_roberta_s_packed_form_never_waits_for_the_device():
    """On meta tensors, which have no values, whatever needs one raises."""
    inputs = {name: x for name, x in packed(batch()).items() if name != "next_sentence_label"}
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    out = RobertaForMaskedLM(ROBERTA).to("meta")(**on_meta)
    out.loss.backward()
    assert out.logits.shape == (len(inputs["labels"]), V)


def test_what_there_is_is_named(tmp_path):
    RobertaForMaskedLM(ROBERTA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must say \"model_type\": \"ernie\", got 'roberta': .*AutoModel loads"):
        ErnieForPreTraining.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "electra"}))
    with pytest.raises(ValueError, match="'electra': expected one of albert, bert, ernie, roberta, xlm-roberta"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": S + 3}))
    with pytest.raises(ValueError, match=rf"positions start behind pad_token_id: .* = {S + 2}, got {S + 3}"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    without = ErnieForPreTraining(ErnieConfig(**vars(ERNIE) | {"use_task_id": False}))
    with pytest.raises(ValueError, match="use_task_id must be True or False, got 1"):
        ErnieConfig(use_task_id=1)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"has no task types \(use_task_id = False\): leave task_type_ids out"):
        without(ids, task_type_ids=ids)
    with pytest.raises(ValueError, match=r"task_type_ids must lie in \[0, 3\), task_type_vocab_size being 3"):
        ErnieForPreTraining(ERNIE)(ids, task_type_ids=3 * ids)
