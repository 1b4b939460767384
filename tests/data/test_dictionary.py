"""Words of a list in token ids: by hand, beside a slow telling of the same rule, and masked whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fastbert.data import mask_tokens, special_ids
from fastbert.data.dictionary import Dictionary, read_words

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]


@pytest.fixture(scope="module")
def tokenizer():
    """A letter, a token; ids 5 to 8 are a to d."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(TOKENS[:5])
    return tokenizer


def ids(text):
    return np.array([TOKENS.index(letter) if letter.isalpha() else 3 for letter in text])


def units(dictionary, text):
    """The text cut at the words; "|" is a special token."""
    continued = dictionary.continues(ids(text))
    return "".join(("" if c else " ") + letter for letter, c in zip(text, continued, strict=True)).split()


def test_the_longest_word_from_left_to_right(tokenizer):
    dictionary = Dictionary(["ab", "abc", "bcd", "dd", "a", "axb"], tokenizer)
    assert units(dictionary, "abcd") == ["abc", "d"]
    assert units(dictionary, "abdbcd") == ["ab", "d", "bcd"]
    assert units(dictionary, "ddd|dd") == ["dd", "d", "|", "dd"]
    assert units(dictionary, "ab|cab") == ["ab", "|", "c", "ab"]
    assert units(dictionary, "aab") == ["a", "ab"], "nothing of a word that is left out"
    assert not len(dictionary.continues(ids("")))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=8), st.text("abcd|", max_size=40))
def test_it_is_what_a_set_of_words_finds(tokenizer, words, text):
    known, expected, place = {word for word in words if len(word) > 1}, [], 0
    if not known:
        with pytest.raises(ValueError, match="no word of the dictionary has several tokens"):
            Dictionary(words, tokenizer)
        return
    while place < len(text):
        length = next((n for n in (4, 3, 2) if text[place : place + n] in known), 1)
        expected.append(text[place : place + length])
        place += length
    dictionary = Dictionary(words, tokenizer)
    assert units(dictionary, text) == expected
    assert dictionary.fingerprint() == Dictionary(reversed(words), tokenizer).fingerprint()


def test_words_are_masked_whole(tokenizer):
    dictionary, special = Dictionary(["abc"], tokenizer), special_ids(tokenizer)
    text = np.concatenate([[2], np.tile(ids("abcd"), 10), [3]])
    for sample in range(50):
        masked, positions, _ = mask_tokens(
            text, np.array([0, 42]), np.array([sample]), special, len(TOKENS), seed=1, epoch=0, dictionary=dictionary
        )
        chosen = np.zeros(42, bool)
        chosen[positions] = True
        of_words = chosen[1:-1].reshape(10, 4)[:, :3]
        assert (of_words.all(1) | ~of_words.any(1)).all() and len(positions) <= 6
        hidden = (masked == special.mask)[1:-1].reshape(10, 4)[:, :3]
        assert (hidden.all(1) | ~hidden.any(1)).all()


def test_a_file_of_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeff  New York \n\n北京\r\n".encode())
    assert read_words(path) == ["New York", "北京"]
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"words\.txt has no word: expected one a line"):
        read_words(path)
    path.write_bytes("北京".encode("gb18030"))
    with pytest.raises(ValueError, match=r"words\.txt is not UTF-8 .*: save it as UTF-8, a word a line"):
        read_words(path)
