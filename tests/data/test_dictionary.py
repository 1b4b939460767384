"""Words of a list in text: by hand, beside a slow telling of the same rule, and what cannot be masked whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fastbert.data.dictionary import Dictionary, read_words, say_what_is_not_found

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd", *"诸葛亮·兮", "ab"]


@pytest.fixture(scope="module")
def tokenizer():
    """A letter, a token, in lower case and without accents; and one of two letters."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(TOKENS[:5])
    return tokenizer


def found(dictionary, text):
    return [text[start:end] for start, end in dictionary.find(text)]


def test_the_longest_word_from_left_to_right(tokenizer):
    words = ["诸葛", "诸葛亮", "葛亮兮", "兮兮", "亮", "〇·𠮷α", "New York", "naïve", "１９"]
    dictionary = Dictionary(words, tokenizer)
    assert found(dictionary, "诸葛亮兮") == ["诸葛亮"], "the longest, and none that begins within it"
    assert found(dictionary, "葛亮兮诸葛") == ["葛亮兮", "诸葛"]
    assert found(dictionary, "兮兮兮\n兮") == ["兮兮"], "no word over a line's end"
    assert found(dictionary, "二〇·𠮷α亮") == ["〇·𠮷α"], "characters that jieba never finds in a word"
    assert found(dictionary, "NEW york, New Yorkers, aNew York") == ["NEW york"], "whole words, as the tokenizer sees"
    assert found(dictionary, "Naive naïve１９年") == ["Naive", "naïve", "１９"]
    assert found(dictionary, "New Yorkers诸葛亮") == ["诸葛亮"]
    assert dictionary.find("") == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("诸葛亮兮", min_size=1, max_size=4), min_size=1, max_size=8), st.text("诸葛亮兮\n", max_size=40)
)
def test_it_is_what_a_set_of_words_finds(tokenizer, words, text):
    known, expected, place = {word for word in words if len(word) > 1}, [], 0
    while place < len(text):
        length = max((len(word) for word in known if text.startswith(word, place)), default=1)
        expected += [(place, place + length)] if length > 1 else []
        place += length
    assert Dictionary([*words, "无关"], tokenizer).find(text) == expected


def test_what_cannot_be_masked_whole_is_said(tokenizer):
    assert say_what_is_not_found(["诸葛亮", "诸葛亮·兮"], tokenizer) is None
    assert say_what_is_not_found(["诸葛亮", "亮", "AB", "葛〇", "未"], tokenizer) == (
        "of the dictionary's 5 words 2 are one token anyway, such as 亮, AB; 2 have a character that the "
        "vocabulary lacks, such as 葛〇, 未"
    )


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
