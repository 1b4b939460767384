"""Byte-level BPE: transformers gives the same ids, training repeats, nothing is unknown."""

import json
import pydoc_data.topics

import numpy as np
import pytest

from fastbert.data import continuations, load_tokenizer, save_tokenizer, special_ids, train_byte_bpe
from fastbert.data.tokenizer import fingerprint

TEXTS = list(pydoc_data.topics.topics.values())[:20]
HARD = [
    "The yield expression", " don't  do\tthat", "Köln 中国 ☃ \u0301", "a <mask> of <mask>, <s>x</s>", "", "\x00\x7f",
    "price: 12,345.67 !!!", "ASYNCHRONOUS generator-functions",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(TEXTS, 600)


@pytest.mark.parametrize("lowercase", [False, True])
def test_transformers_reads_the_same_ids(tokenizer, tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    trained = train_byte_bpe(TEXTS, 600, lowercase=True) if lowercase else tokenizer
    save_tokenizer(trained, tmp_path, max_length=512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("TokenizersBackend" if lowercase else "RobertaTokenizer")
    again = load_tokenizer(tmp_path)
    for text in HARD:
        assert theirs(text).input_ids == trained.encode(text).ids == again.encode(text).ids
        assert theirs(text, "B").input_ids == trained.encode(text, "B").ids
    assert theirs.mask_token_id == special_ids(trained).mask == 4
    assert (theirs.pad_token_id, theirs.bos_token, theirs.model_max_length) == (1, "<s>", 512)
    assert fingerprint(again) == fingerprint(trained)
    ids = trained.encode(HARD[2]).ids
    assert lowercase or trained.decode(ids) == " " + HARD[2]


def test_older_folders_have_vocab_json_and_merges_txt(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + (tmp_path / "merges.txt").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    ours, theirs = load_tokenizer(tmp_path), transformers.RobertaTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        if "<mask>" not in text:  # without its settings theirs keeps the space before <mask>
            assert ours.encode(text).ids == theirs(text).input_ids
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match=r"merges\.txt does not hold the merges of vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"<s>": 0}')
    with pytest.raises(ValueError, match=r"vocab\.json lacks <pad>, </s>, <unk>, <mask>: RoBERTa needs"):
        load_tokenizer(tmp_path)


def test_training_repeats_and_merges_count(tokenizer):
    again = train_byte_bpe(TEXTS, 600)
    assert again.to_str() == tokenizer.to_str() and tokenizer.get_vocab_size() == 600
    vocab = tokenizer.get_vocab()
    assert [vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    other = json.loads(tokenizer.to_str())
    other["model"]["merges"].reverse()
    assert fingerprint(type(tokenizer).from_str(json.dumps(other))) != fingerprint(tokenizer)


def test_a_word_begins_with_its_space(tokenizer):
    continues = continuations(tokenizer)
    ids = np.array(tokenizer.encode("The generators, again <mask> x", add_special_tokens=False).ids)
    pieces = [tokenizer.id_to_token(i) for i in ids]
    assert [piece for piece, inside in zip(pieces, continues[ids], strict=True) if not inside] == [
        piece for piece in pieces if piece.startswith("Ġ") or piece == "<mask>"
    ]
    assert continues[ids].any()


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="5 special tokens and 256 bytes: expected >= 261, got 260"):
        train_byte_bpe(TEXTS, 260)
    with pytest.raises(ValueError, match="the texts hold no word"):
        train_byte_bpe([""], 300)
