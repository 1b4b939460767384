"""ALBERT: the numbers of transformers, folders both ways, gradients of shared weights, what is refused."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bert_batches import SMALL, B, V, batch, encoder_inputs, packed, unsettled
from torch import nn

import fastbert
from fastbert import AlbertConfig, AlbertForPreTraining, AlbertModel, AutoModel, BertForPreTraining, BertModel
from fastbert.backends import linear, native
from fastbert.data import train_tokenizer
from fastbert.testing import assert_close

CONFIG = AlbertConfig.preset(
    "tiny", vocab_size=V, embedding_size=16, hidden_size=32, intermediate_size=64, num_attention_heads=4,
    num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2, max_position_embeddings=16, initializer_range=0.2,
    classifier_dropout_prob=0.0,
)  # fmt: skip
ONE_LAYER = AlbertConfig(**vars(CONFIG) | {"num_hidden_groups": 1, "inner_group_num": 1})
LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0."


def ordered(inputs: dict) -> dict:
    return {"sentence_order_label" if name == "next_sentence_label" else name: x for name, x in inputs.items()}


@pytest.fixture
def model() -> AlbertForPreTraining:
    return unsettled(AlbertForPreTraining(CONFIG).eval())


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rewrite(folder: Path, change) -> None:
    tensors = change(safetensors.torch.load_file(folder / "model.safetensors"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [dict, packed], ids=["padded", "packed"])
@torch.no_grad()
def test_transformers_gives_the_same_numbers_and_folders_go_both_ways(transformers, model, folder, tmp_path, form):
    inputs = ordered(batch())
    inputs["sentence_order_label"] = torch.tensor([0, 1, -100, 1])
    ours_of = ordered(form(batch())) | {"sentence_order_label": inputs["sentence_order_label"]}
    real, labelled = inputs["attention_mask"].bool(), inputs["labels"] != -100
    theirs, report = transformers.AlbertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ours, expected = model(**ours_of), theirs(**inputs)
    torch.testing.assert_close(ours.prediction_logits, expected.prediction_logits[labelled], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sop_logits, expected.sop_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=1e-4)
    assert expected.prediction_logits.std() > 0.1, "the numbers are too alike to tell two models apart"
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(AlbertForPreTraining.from_pretrained(tmp_path / "theirs"), model)
    assert AlbertForPreTraining.from_pretrained(tmp_path / "theirs").config == CONFIG

    words = transformers.AlbertForMaskedLM.from_pretrained(folder)
    without_order = {name: x for name, x in inputs.items() if name != "sentence_order_label"}
    torch.testing.assert_close(ours.mlm_loss, words(**without_order).loss, rtol=0, atol=1e-4)
    words.save_pretrained(tmp_path / "words")
    with pytest.warns(UserWarning, match=r"lacks albert\.pooler\.weight, .*sop_classifier\.classifier\.bias: newly"):
        loaded = AlbertForPreTraining.from_pretrained(tmp_path / "words")
    torch.testing.assert_close(loaded(**ours_of).prediction_logits, ours.prediction_logits)

    model.albert.save_pretrained(tmp_path / "encoder")
    encoder = transformers.AlbertModel.from_pretrained(tmp_path / "encoder")
    expected = encoder(**encoder_inputs(without_order))
    ours = model.albert(**encoder_inputs(form(batch())))
    hidden = ours.last_hidden_state if form is packed else ours.last_hidden_state[real]
    torch.testing.assert_close(hidden, expected.last_hidden_state[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, rtol=0, atol=1e-4)
    encoder.save_pretrained(tmp_path / "their encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "their encoder")
    assert type(loaded) is AlbertModel and same(loaded, model.albert)


def test_old_names_and_an_explicit_decoder_are_read(model, folder):
    def age(tensors):
        old = {}
        for name, x in tensors.items():
            for norm in ("LayerNorm", "layer_norm"):
                name = name.replace(f"{norm}.weight", f"{norm}.gamma").replace(f"{norm}.bias", f"{norm}.beta")
            old[name] = x
        old["albert.embeddings.position_ids"] = torch.arange(16)[None]
        old["predictions.decoder.weight"] = old["albert.embeddings.word_embeddings.weight"].clone()
        old["predictions.decoder.bias"] = old.pop("predictions.bias")
        return {f"module.{name}": x for name, x in old.items()}

    rewrite(folder, age)
    assert same(AlbertForPreTraining.from_pretrained(folder), model)
    assert same(AlbertModel.from_pretrained(folder), model.albert)


def test_the_file_has_the_names_and_fields_that_other_readers_look_for(folder):
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    layer = ("attention.query", "attention.dense", "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm")
    assert {f"{LAYER}{name}.weight" for name in layer} <= names
    assert {"albert.encoder.embedding_hidden_mapping_in.bias", "albert.pooler.weight", "predictions.dense.weight",
            "predictions.LayerNorm.bias", "predictions.bias", "sop_classifier.classifier.weight"} <= names  # fmt: skip
    assert not any("decoder" in name or "qkv" in name or "transform" in name for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "albert" and config["architectures"] == ["AlbertForPreTraining"]
    assert config["position_embedding_type"] == "absolute" and config["embedding_size"] == 16


# --- what is shared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [("base", 11_683_584), ("large", 17_683_968), ("xlarge", 58_724_864), ("xxlarge", 222_595_584)],
)
def test_presets_have_the_published_models_parameters_each_once(preset, numbers):
    with torch.device("meta"):
        model = AlbertModel(AlbertConfig.preset(preset))
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == numbers
    optimizer = fastbert.LazyAdam(parameters)
    assert len(optimizer.param_groups[0]["params"]) == len(parameters) == len({id(p) for p in parameters})


@pytest.mark.parametrize(
    ("form", "library"),
    [("float32", "torch"), ("autocast", "torch"), ("bfloat16", "torch"), ("autocast", "onednn"),
     pytest.param("autocast", "fastbert", marks=pytest.mark.skipif(native.module is None, reason="no C++ module"))],
)  # fmt: skip
def test_gradients_of_shared_weights_are_summed_in_float32_from_the_last_layer_on(form, library, monkeypatch):
    """To the bit what layers with weights of their own, equal ones, give when their gradients are added so.

    torch and oneDNN cast weights for bfloat16 products; our own products take them in float32.
    """
    monkeypatch.setattr(linear, "SMALL", dict.fromkeys(linear.SMALL, 1))
    shared = AlbertForPreTraining(ONE_LAYER).eval()
    untied = AlbertForPreTraining(AlbertConfig(**vars(ONE_LAYER) | {"num_hidden_groups": 4})).eval()
    untied.load_state_dict({
        name: shared.state_dict()[name.replace(f"groups.{name.split('groups.')[1][0]}", "groups.0")]
        if "groups." in name else shared.state_dict()[name] for name in untied.state_dict()
    })  # fmt: skip
    gradients = []
    for model in (shared, untied):
        if form == "bfloat16":
            model.bfloat16()
        with fastbert.use_linear(library), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            model(**ordered(packed(batch()))).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    ours, apart = gradients
    for name, gradient in ours.items():
        if name.startswith(LAYER):
            layers = [apart[name.replace("groups.0", f"groups.{i}")].float() for i in (3, 2, 1, 0)]
            expected = (((layers[0] + layers[1]) + layers[2]) + layers[3]).to(gradient.dtype)
            assert torch.equal(gradient, expected), name
        elif name != "albert.embeddings.word_embeddings.weight":
            assert torch.equal(gradient, apart[name]), name


def test_layers_share_weights_by_groups_one_after_another():
    """Two groups of two layers, each two deep: group 0 twice, then group 1 twice."""
    called = []
    model = AlbertModel(CONFIG)
    for name, module in model.named_modules():
        if name.count(".") == 4 and "albert_layers." in name:
            module.register_forward_hook(lambda module, args, out, name=name: called.append(name[28:].split(".")[0::2]))
    model(**encoder_inputs(packed(batch())))
    assert called == [[group, layer] for group in "0011" for layer in "01"]


@pytest.mark.parametrize("form", ["autocast", "bfloat16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_the_packed_form_compiles_whole(form):
    torch.compiler.reset()
    model = AlbertForPreTraining(AlbertConfig(**vars(ONE_LAYER) | {"num_hidden_layers": 2})).eval()
    if form == "bfloat16":
        model.bfloat16()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            loss = run(**ordered(packed(batch()))).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_packed_form_never_waits_for_the_device(dtype):
    """On meta tensors, which have no values, whatever needs one raises."""
    model, inputs = AlbertForPreTraining(CONFIG).to(dtype), ordered(packed(batch()))
    out = model.to("meta")(**{name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    out.loss.backward()
    assert out.loss.device.type == "meta" and out.prediction_logits.shape == (len(inputs["labels"]), V)


def test_a_frozen_model_is_the_model():
    model = AlbertModel(CONFIG).eval()
    frozen, inputs = fastbert.freeze(copy.deepcopy(model)), encoder_inputs(batch())
    with torch.no_grad():
        truth = copy.deepcopy(model).double()
        for results in zip(frozen(**inputs), model(**inputs), truth(**inputs), strict=True):
            assert_close(*results)


@pytest.mark.parametrize("cls", [BertForPreTraining, AlbertForPreTraining])
def test_labels_of_minus_100_count_in_no_head(cls):
    model = cls(SMALL if cls is BertForPreTraining else CONFIG).eval()
    some = torch.tensor([1, -100, 0, -100])
    inputs = batch() | {model.sentence_label: some}
    if cls is AlbertForPreTraining:
        del inputs["next_sentence_label"]
    out = model(**inputs)
    kept = model(**inputs | {model.sentence_label: torch.full((B,), -100)})
    assert kept[2] == 0 and out.loss == out[1] + out[2]
    expected = nn.functional.cross_entropy(out[4][[0, 2]], some[[0, 2]])
    torch.testing.assert_close(out[2], expected)
    words = {name: x for name, x in packed(batch()).items() if name != "next_sentence_label"}
    kept = torch.arange(len(words["labels"])) % 2 == 0
    out = model(**words | {"labels": words["labels"].masked_fill(~kept, -100)})
    expected = nn.functional.cross_entropy(out.prediction_logits[kept], words["labels"][kept])
    torch.testing.assert_close(out.loss, expected)
    assert model(**words | {"labels": words["labels"].fill_(-100)}).loss == 0
    with pytest.raises(ValueError, match=rf"{model.sentence_label} must lie in \[0, 2\), or be -100 .*; got 2"):
        model(**inputs | {model.sentence_label: torch.tensor([0, 1, 2, 0])})


def test_the_order_head_drops_out_in_training_alone(model):
    model.sop_classifier.dropout.p = 0.5
    inputs = ordered(packed(batch()))
    assert not torch.equal(model.train()(**inputs).sop_logits, model(**inputs).sop_logits)
    assert torch.equal(model.eval()(**inputs).sop_logits, model(**inputs).sop_logits)


def test_word_pieces_are_exported_as_bert_s_tokenizer(model, transformers, tmp_path):
    """Whatever model_type says: the same ids, and vocab.txt, where other readers look for a token's id by its line."""
    tokenizer = train_tokenizer(["a few words of some text, words of a text"] * 2, V + 14)
    grown = AlbertForPreTraining(AlbertConfig(**vars(CONFIG) | {"vocab_size": tokenizer.get_vocab_size()}))
    grown.save_pretrained(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a few words [MASK] text").input_ids == tokenizer.encode("a few words [MASK] text").ids
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    assert {token: i for i, token in enumerate(lines)} == tokenizer.get_vocab()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_opened_as_another_model_says_which_it_is(folder, tmp_path):
    BertForPreTraining(SMALL).save_pretrained(tmp_path / "bert")
    message = r'must say "model_type": "{}", got \'{}\': .* another kind of model; fastbert\.AutoModel loads'
    with pytest.raises(ValueError, match=message.format("bert", "albert")):
        BertModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=message.format("albert", "bert")):
        AlbertForPreTraining.from_pretrained(tmp_path / "bert")
    assert type(AutoModel.from_pretrained(tmp_path / "bert")) is BertModel
    set_config(folder, model_type=None)
    assert type(AutoModel.from_pretrained(folder)) is AlbertModel, "by its architectures"
    set_config(folder, model_type="electra")
    with pytest.raises(ValueError, match=r"the architecture 'electra': expected one of albert, bert"):
        AutoModel.from_pretrained(folder)
    for fields in ({"model_type": ["a"]}, {"model_type": None, "architectures": 5}):
        set_config(folder, **fields)
        with pytest.raises(ValueError, match="must name its architecture by model_type, a string"):
            AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_groups": 3}, r"num_hidden_layers must be a multiple of num_hidden_groups.* got 4 and 3"),
        ({"inner_group_num": 0}, "inner_group_num must be an int of at least 1, got 0"),
        ({"embedding_size": "16"}, "embedding_size must be an int of at least 1, got '16'"),
        ({"classifier_dropout_prob": None}, "classifier_dropout_prob is a probability: expected a number .* got None"),
        ({"embedding_size": 32}, r"embeddings\..* has shape \[.*16\], but config\.json asks for \[.*32\]"),
        ({"inner_group_num": 3}, r"lacks .*albert_layers\.2\.attention\.query\.weight.*; fetch or export both anew"),
        ({"is_decoder": True}, "this ALBERT has is_decoder = False only"),
    ],
)
def test_a_config_that_does_not_hold_is_refused(folder, fields, message):
    set_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        AlbertForPreTraining.from_pretrained(folder)


def test_an_embedding_size_without_its_projection_is_refused(folder):
    rewrite(folder, lambda tensors: {name: x for name, x in tensors.items() if "mapping_in" not in name})
    message = r"lacks albert\.encoder\.embedding_hidden_mapping_in\.weight, .*bias: it does not hold .*export both anew"
    with pytest.raises(ValueError, match=message):
        AlbertForPreTraining.from_pretrained(folder)


def test_presets_are_named():
    with pytest.raises(ValueError, match=r"no ALBERT preset is called 'huge': expected one of tiny, .*xxlarge"):
        AlbertConfig.preset("huge")


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_layers_that_share_weights_share_their_norm(norm, tmp_path):
    """Padded as packed, through all layers of both groups; and the folder keeps it."""
    model = AlbertForPreTraining(AlbertConfig(**vars(CONFIG) | {"norm": norm, "norm_groups": 4})).double().eval()
    ids, mask = torch.randint(1, 50, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    with torch.no_grad():
        padded = model(ids, mask).prediction_logits[mask]
        cu_seqlens = torch.tensor([0, 7, 11], dtype=torch.int32)
        packed = model(ids[mask], cu_seqlens=cu_seqlens, max_seqlen=7).prediction_logits
        torch.testing.assert_close(padded, packed, rtol=0, atol=1e-10)
        plain = AlbertForPreTraining(CONFIG).double().eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        assert (plain(ids, mask).prediction_logits[mask] - padded).abs().max() > 1e-3
        model.float().save_pretrained(tmp_path)
        loaded = AlbertForPreTraining.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids, mask).prediction_logits, model(ids, mask).prediction_logits)
