"""The WordPiece tokenizer: trained, saved, loaded, and read by transformers."""

import json
import random
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models

from fastbert.data import SpecialIds, load_tokenizer, save_tokenizer, special_ids, train_tokenizer
from fastbert.data.tokenizer import LARGEST_VOCABULARY, SPECIAL_TOKENS, fingerprint, vocab_size

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
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = train_tokenizer((x[:300] for x in topics.values()), 700)
    assert run.stdout == f"{here.get_vocab_size()} {fingerprint(here)}\n"


def test_characters_take_a_third_and_what_merges_leave():
    """Chinese characters are words, so nothing is merged; Korean ones are not, and their words fill the rest."""
    chinese = [chr(0x4E00 + i) for i in range(100)]
    texts = [c * (200 - i) for i, c in enumerate(chinese)]
    vocab = train_tokenizer(texts, 90).get_vocab()
    assert {token for token in vocab if len(token) == 1} == set(chinese[:85]) and len(vocab) == 90
    assert train_tokenizer(texts, 200).get_vocab_size() == 105

    korean = [chr(0xAC00 + i) for i in range(100)]
    texts = [
        " ".join([a + b + c] * (200 - i))
        for i, (a, b, c) in enumerate(zip(korean[:-2], korean[1:-1], korean[2:], strict=True))
    ]
    vocab = train_tokenizer(texts, 90).get_vocab()
    assert len(vocab) == 90 and len([token for token in vocab if len(token) == 1]) == 30


def test_words_that_cannot_be_encoded_count_for_nothing():
    """Blobs of base64 among pages, whose pieces would push the pages' out. WordPiece encodes up to 100 characters."""
    draw = random.Random(0)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    blobs = ["".join(draw.choices(letters, k=20_000)) for _ in range(15)]
    plain = train_tokenizer(TEXTS, 500)
    assert fingerprint(train_tokenizer([*blobs, *TEXTS, *blobs], 500)) == fingerprint(plain)
    longest = "ab" * 50
    vocab = train_tokenizer([f"{longest} {longest}b"] * 9, 500).get_vocab()
    assert longest in vocab and longest + "b" not in vocab and "##b" + "ab" * 49 + "b" not in vocab
    with pytest.raises(ValueError, match=r"no word of at most 100 characters.*put spaces between the words"):
        train_tokenizer(["กขค" * 40], 100)


def test_a_vocabulary_is_bounded():
    for size in (LARGEST_VOCABULARY + 1, 10**9, 2**64):
        with pytest.raises(ValueError, match=rf"vocab_size .* expected <= 16777216, got {size}"):
            train_tokenizer(["a"], size)


def test_progress_says_when_merging_begins(capsys):
    train_tokenizer(["aa bb aa"], 64, progress=True)
    assert capsys.readouterr().out == "tokenizer: 2 different words, merging their pieces into 64 entries\n"


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
