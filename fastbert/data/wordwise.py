"""The ids of many sentences, several times as fast as the tokenizer alone, and the same ones.

Most of what a tokenizer is given it has seen before. BERT's never looks across a space, so what stands between two
spaces has the same ids wherever it stands, and is looked up once it is known. What is new and plain ASCII is split at
punctuation, so that of "word", "Word." and "(word" the word alone is taken apart into pieces.

Tokenizers that do look across spaces (byte-level BPE, Unigram with its own rules), and vocabularies with words of
several words added to them, are asked for each sentence as a whole.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.short_texts import ShortTexts, Texts, is_short

Ids = tuple[np.ndarray, np.ndarray]  # of texts in a row: int64 [T], and how many each text has, int64 [texts]

# What is remembered is forgotten as a whole when it becomes more than this, some 200 MB.
_MOST_PARTS = 1 << 19
_MOST_IDS = 1 << 22
_LONGEST_PART = 64  # characters; a longer stretch without a space is rarely seen twice
_LINE_END = "\n"  # stands for the end of a sentence
_ASCII_WORDS = re.compile(r"[0-9A-Za-z]+|[^0-9A-Za-z]")  # and punctuation, each mark for itself


class Encoder:
    """Ids without special tokens; those that a text spells out are read as plain text.

    Args:
        tokenizer: left as it is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the next lines change it
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.lowercase = _lowercase_of_wordwise(self.tokenizer)
        self.parts = _Memory(self._parts, lambda part: len(part) <= _LONGEST_PART and not is_short(part))
        self.short = ShortTexts(2 * _MOST_PARTS)
        self.words = _Memory(self._words, lambda word: len(word) <= _LONGEST_PART)

    def __call__(self, sentences: list[str]) -> Ids:
        """The ids of all sentences in a row, int64 [T], and how many each has, int64 [sentences], 0 of an empty one."""
        if self.lowercase is None or not sentences:
            return self._whole(sentences)
        text = f" {_LINE_END} ".join(sentences)
        if text.count(_LINE_END) != len(sentences) - 1:  # a line end within a sentence is read as a space is
            text = f" {_LINE_END} ".join(sentence.replace(_LINE_END, " ") for sentence in sentences)
        if self.parts.is_full():
            self.parts.forget()
            self.short.forget()
        parts = Texts.of(text)
        return _per_text(self.parts.ids_of(self._numbers(parts)), parts.are(_LINE_END))

    def _numbers(self, parts: Texts) -> np.ndarray:
        """By which `self.parts` has their ids, int64 [parts]."""
        short = parts.are_short()
        numbers = np.where(short, self.short.find(parts.keys), -1)
        if len(new := np.flatnonzero(numbers < 0)):
            numbers[new] = self.parts.numbers_of(parts.at(new))
            added = new[short[new]]
            added = added[np.unique(numbers[added], return_index=True)[1]]
            if self.short.has_room(len(added)):
                self.short.add(tuple(key[added] for key in parts.keys), numbers[added])
        return numbers

    def _parts(self, parts: list[str]) -> Ids:
        plain = np.fromiter((part.isascii() and part.isprintable() for part in parts), bool, len(parts))
        text = " ".join(part for part, is_plain in zip(parts, plain, strict=True) if is_plain)
        words = _ASCII_WORDS.findall(text.lower() if self.lowercase else text)
        if self.words.is_full():
            self.words.forget()
        numbers = self.words.numbers_of(words)
        ids, lengths = _per_text(self.words.ids_of(numbers), numbers == self.words.get(" ", -1))
        if plain.all():
            return ids, lengths
        others = self._whole([part for part, is_plain in zip(parts, plain, strict=True) if not is_plain])
        both = np.empty(len(parts), np.int64)
        both[plain], both[~plain] = lengths[: plain.sum()], others[1]  # no plain part joins to one empty text
        of_plain = np.repeat(plain, both)
        merged = np.empty(len(of_plain), np.int64)
        merged[of_plain], merged[~of_plain] = ids, others[0]
        return merged, both

    def _words(self, words: list[str]) -> Ids:
        tokenize = self.tokenizer.model.tokenize
        return joined_ids([piece.id for piece in tokenize(word)] if word != " " else [] for word in words)

    def _whole(self, texts: list[str]) -> Ids:
        return joined_ids(each.ids for each in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))


class _Memory(dict[str, int]):
    """What was looked up: its number, counted from 0, by which `ends` and `ids` have its ids.

    Args:
        learn: the ids of texts that are new.
        keeps: says whether a text, given again, shall have the same number.
    """

    def __init__(self, learn: Callable[[list[str]], Ids], keeps: Callable[[str], bool] = lambda text: True):
        super().__init__()
        self.learn, self.keeps = learn, keeps
        self.forget()

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self.ends) - 1 + len(self.new)
        self.new.append(text)
        return number

    def is_full(self) -> bool:
        return len(self.ends) > _MOST_PARTS or len(self.ids) > _MOST_IDS

    def forget(self) -> None:
        self.clear()
        self.new: list[str] = []
        self.ids, self.ends = array("i"), array("i", [0])

    def numbers_of(self, texts: list[str]) -> np.ndarray:
        """int64 [texts]"""
        try:
            numbers = np.fromiter(map(self.__getitem__, texts), np.int64, len(texts))
            if self.new:
                ids, lengths = self.learn(self.new)
                ends = (self.ends[-1] + np.cumsum(lengths)).astype(np.int32)
                self.ids.frombytes(ids.astype(np.int32).tobytes())
                self.ends.frombytes(ends.tobytes())
        except BaseException:  # such as of text that is no Unicode: the numbers just given have no ids
            for text in self.new:
                self.pop(text, None)
            self.new = []
            raise
        new, self.new = self.new, []
        for text in new:
            if not self.keeps(text):
                del self[text]
        return numbers

    def ids_of(self, numbers: np.ndarray) -> Ids:
        ends = np.frombuffer(self.ends, np.int32)
        starts = ends[numbers]
        lengths = ends[numbers + 1] - starts
        total = np.cumsum(lengths)
        places = np.repeat(starts - total + lengths, lengths) + np.arange(total[-1] if len(total) else 0)
        return np.frombuffer(self.ids, np.int32)[places].astype(np.int64), lengths


def _per_text(of_parts: Ids, between: np.ndarray) -> Ids:
    """The ids of texts whose parts stand in a row; `between` [parts] says which stand between two texts."""
    ids, lengths = of_parts
    total = np.cumsum(lengths)
    return ids, np.diff(np.append(total[between], len(ids)), prepend=0)


def joined_ids(texts: Iterable[list[int]]) -> Ids:
    """The ids of texts in a row."""
    texts = list(texts)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.fromiter(chain.from_iterable(texts), np.int64, lengths.sum()), lengths


def _lowercase_of_wordwise(tokenizer: Tokenizer) -> bool | None:
    """Whether a tokenizer of BERT's kind lower-cases; None where it is of another kind, whose words are not looked up.

    `WordPiece` reads words that do not depend on each other, and BERT's normaliser and splitting let none reach across
    a space; of ASCII they make lower case and words between single marks.
    """
    whole = json.loads(tokenizer.to_str())
    normalizer, splitting = whole["normalizer"] or {}, whole["pre_tokenizer"] or {}
    kinds = normalizer.get("type"), splitting.get("type"), whole["model"].get("type")
    added = [token for token in whole["added_tokens"] if not token["special"]]
    if kinds != ("BertNormalizer", "BertPreTokenizer", "WordPiece") or added:
        return None
    return normalizer["lowercase"]
