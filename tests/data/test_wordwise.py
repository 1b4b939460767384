"""Words that are looked up have the tokenizer's own ids, whatever the text is."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastbert.data import train_tokenizer, train_unigram
from fastbert.data.byte_bpe import train_byte_bpe
from fastbert.data.short_texts import ShortTexts, Texts
from fastbert.data.wordwise import Encoder

TEXTS = [
    "The film's first-rate cast (of 12) can't save it... 3.50 dollars! Überraschung: façade, Ελλάς, 电影很好看.",
    'It is, in short, "unwatchable" - a waste of e-mail@example.com & #hashtags_of_2024.',
] * 3
# What decides where words end, what lower-casing and the stripping of marks change, and what is removed.
PIECES = [
    "the", "The", "film", "FILM'S", "a", "ing", "12", "x" * 101, "-" * 70, ".", ",", "'", "-", "_", "#", "##", "^", "`",
    " ", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\xad", "\0",
    "\ufffd", "é", "e\u0301", "\u0301", "İ", "ß", "ſ", "K", "Σ", "ς", "½", "ﬁ", "中", "。", "🙂", "ك", "ि",
    "[MASK]", "[SEP]",
]  # fmt: skip
sentences = st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), max_size=8)


def expected(tokenizer, texts):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def split(ids, lengths):
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


KINDS = {
    "uncased": lambda: train_tokenizer(TEXTS, 200),
    "cased": lambda: train_tokenizer(TEXTS, 200, lowercase=False),
    "bpe": lambda: train_byte_bpe(TEXTS, 300),
    "unigram": lambda: train_unigram(TEXTS, 120),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A tokenizer, and an encoder that remembers what earlier examples had."""
    tokenizer = KINDS[request.param]()
    return tokenizer, Encoder(tokenizer)


@settings(max_examples=150, deadline=None)
@given(texts=sentences)
def test_ids_are_the_tokenizer_s(kind, texts):
    tokenizer, encoder = kind
    assert split(*encoder(texts)) == expected(tokenizer, texts)


def test_what_is_remembered_is_bounded_and_forgotten_without_harm(monkeypatch):
    monkeypatch.setattr("fastbert.data.wordwise._MOST_PARTS", 64)
    tokenizer = train_tokenizer(TEXTS, 200)
    encoder, largest = Encoder(tokenizer), 0
    for start in range(0, 300, 5):
        texts = [f"the film number{start} has {'z' * 80}{start} and zażółć{i}" for i in range(3)] + TEXTS[:1]
        assert split(*encoder(texts)) == expected(tokenizer, texts)
        assert encoder.short.taken <= 64 and len(encoder.parts.ends) < 128
        assert all(len(part.encode()) > 15 and len(part) <= 64 for part in encoder.parts)
        largest = max(largest, encoder.short.taken)
    assert largest > 40


def test_neither_long_words_nor_a_text_that_raised_are_remembered():
    tokenizer = train_tokenizer(TEXTS, 200)
    encoder = Encoder(tokenizer)
    encoder(["x" * 1000 + " the film"])
    assert max(map(len, [*encoder.words, *encoder.parts])) <= 64
    with pytest.raises(TypeError):
        encoder(["hello", "\ud800"])
    for texts in (["un"], ["hello"], ["the cast"]):
        assert split(*encoder(texts)) == expected(tokenizer, texts)


def test_short_texts_are_told_apart_in_a_table_that_is_nearly_full():
    """By the last byte, by their length, by zero bytes; those that begin at one slot go on to the next ones."""
    texts = list(dict.fromkeys("a" * length + end for length in range(15) for end in "\0bcdéf"))
    table, parts = ShortTexts(64), Texts.of(" ".join(texts))
    short = np.flatnonzero(parts.are_short())
    chosen = short[np.arange(len(short)) % 2 == 0][:60]
    keys = tuple(key[chosen] for key in parts.keys)
    twice = tuple(np.concatenate([key, key]) for key in keys)
    table.add(twice, np.concatenate([chosen, chosen]).astype(np.int32))
    found = table.find(parts.keys)
    assert set(found[chosen] - chosen) == {0}
    others = np.setdiff1d(short, chosen)
    assert set(found[others]) == {-1}
    assert parts.at(np.arange(len(texts))) == texts and not (found[~parts.are_short()] >= 0).any()


def test_words_of_several_words_are_found_as_the_tokenizer_finds_them():
    tokenizer = train_tokenizer(TEXTS, 200)
    tokenizer.add_tokens(["first rate", "can't"])
    texts = ["a first rate film can't be", "first", "rate"]
    assert split(*Encoder(tokenizer)(texts)) == expected(tokenizer, texts)
    assert tokenizer.token_to_id("first rate") in Encoder(tokenizer)(texts)[0]


def test_another_normaliser_is_not_taken_for_bert_s():
    """One that replaces "a b" looks across the space."""
    whole = json.loads(train_tokenizer(TEXTS, 200).to_str())
    replaces = {"type": "Replace", "pattern": {"String": "in short"}, "content": "short"}
    whole["normalizer"] = {"type": "Sequence", "normalizers": [replaces, whole["normalizer"]]}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    assert split(*Encoder(tokenizer)(TEXTS)) == expected(tokenizer, TEXTS)
