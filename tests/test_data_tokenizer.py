"""The WordPiece tokenizer: trained, saved, loaded, and read by transformers."""

import json
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models

from fastbert.data import SpecialIds, load_tokenizer, save_tokenizer, special_ids, train_tokenizer
from fastbert.data.tokenizer import SPECIAL_TOKENS, fingerprint, vocab_size

TEXTS = [text for _, text in sorted(topics.items())][:20]
SENTENCE = "Héllo WORLD, the unaffable statement 中文 don't [MASK] ?!"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 1024)


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert special_ids(tokenizer) == SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))


def test_encoding(tokenizer):
    encoding = tokenizer.encode("The STATEMENT", "the class")
    assert encoding.tokens == ["[CLS]", "the", "statement", "[SEP]", "the", "class", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.encode("☃").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("statementing classes").ids) == "statementing classes"


def test_case():
    texts = ["Case Café"] * 9
    assert "case" in train_tokenizer(texts, 64).get_vocab()
    cased = train_tokenizer(texts, 64, lowercase=False)
    assert "Case" in cased.get_vocab() and "Café" in cased.get_vocab()


def test_training_repeats():
    """Ties are everywhere in so little text, and each process has other hash seeds."""
    program = (
        "from fastbert.data.tokenizer import *; from pydoc_data.topics import topics\n"
        "t = train_tokenizer((x[:300] for x in topics.values()), 700)\n"
        "print(t.get_vocab_size(), fingerprint(t))"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    here = train_tokenizer((x[:300] for x in topics.values()), 700)
    assert {run.stdout for run in runs} == {f"{here.get_vocab_size()} {fingerprint(here)}\n"}


def test_most_frequent_characters_are_kept():
    characters = [chr(0x4E00 + i) for i in range(100)]
    texts = [c * (200 - i) for i, c in enumerate(characters)]
    kept = {token for token in train_tokenizer(texts, 90).get_vocab() if len(token) == 1}
    assert kept == set(characters[:30])


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_reads_the_same(tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(TEXTS, 512, lowercase)
    save_tokenizer(tokenizer, tmp_path, max_length=128)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (SENTENCE, TEXTS[0][:400]):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids == load_tokenizer(tmp_path).encode(text).ids
    assert theirs.model_max_length == 128
    assert (theirs.pad_token_id, theirs.mask_token_id) == (0, 4)
    vocab = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert [tokenizer.token_to_id(token) for token in vocab] == list(range(len(vocab)))


@pytest.mark.parametrize("blank", [True, False])
def test_an_embedding_is_as_large_as_the_highest_id_asks(blank):
    """Unused ids, as a vocab.txt with a line twice leaves them: three tokens, but ids up to 4."""
    vocab = {"[UNK]": 0, "a": 2, "b": 4} if blank else {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    assert tokenizer.get_vocab_size() == 3 and vocab_size(tokenizer) == (5 if blank else 3)


def test_loaded_tokenizer_neither_pads_nor_truncates(tmp_path, tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=6)
    save_tokenizer(other, tmp_path)
    assert len(other.encode("the").ids) == 6
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the the the the").ids == tokenizer.encode("the the the the").ids
    assert loaded.encode("the").ids == tokenizer.encode("the").ids


def test_fingerprint_is_of_ids(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    whole = json.loads(tokenizer.to_str())
    whole["normalizer"]["lowercase"] = False
    assert fingerprint(Tokenizer.from_str(json.dumps(whole))) != fingerprint(tokenizer)


def test_errors(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"expected >= 64, got 63"):
        train_tokenizer(TEXTS, 63)
    with pytest.raises(ValueError, match="no word"):
        train_tokenizer([" ", "\n"], 100)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \[PAD\], \[CLS\], \[SEP\], \[MASK\]"):
        special_ids(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
