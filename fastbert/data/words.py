"""Where the words of a text are that its tokenizer does not show: Chinese words, words of a dictionary.

They are looked for once, in the text, when it is tokenised; the token store keeps for every token whether it goes on
with the word of the one before (`TokenStore.words`), and masking takes such words whole.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from fastbert import extras
from fastbert.data.dictionary import Dictionary
from fastbert.data.tokenizer import continuations, is_wide

Segmentation = Literal["jieba", "spaces"]


@dataclass(frozen=True)
class Words:
    """How a corpus is divided into words.

    Attributes:
        segmentation: "jieba", a Chinese text's words by that library; "spaces", the words of a text in which they stand
            apart already, as in a treebank: spaces beside a Chinese, Japanese or Korean character are taken out of the
            text; None, words as the vocabulary's pieces tell them.
        dictionary: words or phrases that are found in the text itself, whatever the segmentation makes of it: one of
            them is a word, and what it cuts off of another is a word too.
    """

    segmentation: Segmentation | None
    dictionary: tuple[str, ...] = ()

    def meta(self) -> dict[str, Any]:
        """What a store says of its words."""
        words = "\n".join(sorted(set(self.dictionary)))
        return {
            "segmentation": self.segmentation,
            "dictionary": hashlib.sha256(words.encode()).hexdigest() if words else None,
        }

    def check(self) -> None:
        """Raises ImportError where a library is missing, ValueError where the dictionary has no word of two letters."""
        needed = {"jieba": self.segmentation == "jieba", "ahocorasick_rs": bool(self.dictionary)}
        if why := extras.missing(
            "words of Chinese or of a dictionary need", *(name for name in needed if needed[name])
        ):
            raise ImportError(why)
        if self.dictionary and max(map(len, self.dictionary)) < 2:
            raise ValueError("no word of the dictionary has several characters, so that it changes nothing")

    def plain(self, text: str) -> str:
        """The text as it is tokenised: without the spaces that only tell words apart."""
        return "".join(cut_at_spaces(text)) if self.segmentation == "spaces" else text

    def finder(self, tokenizer: Tokenizer) -> "WordFinder":
        """What finds them, for a process of its own: it holds all of the dictionary. Raises as `check`."""
        return WordFinder(self, tokenizer)


class WordFinder:
    """Tokenises texts and says which tokens go on with the word of the token before; see `Words.finder`."""

    def __init__(self, words: Words, tokenizer: Tokenizer):
        words.check()
        cutters = {"jieba": jieba_cutter, "spaces": lambda: cut_at_spaces, None: lambda: None}
        self.cut = cutters[words.segmentation]()
        self.dictionary = Dictionary(words.dictionary, tokenizer) if words.dictionary else None
        self.continues, self.tokenizer = continuations(tokenizer), tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        """Ids of each text without special tokens, and of all tokens in a row whether they continue a word, bool [T].

        A token that begins within a word goes on with it; so tokens that reach over a word's end (Unigram and BPE have
        such) join both words.
        """
        pieces = [[text] if self.cut is None else self.cut(text) for text in texts]
        texts = ["".join(some) for some in pieces]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [each.ids for each in encoded]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
        offset = np.fromiter((start for each in encoded for start, _ in each.offsets), np.int64, lengths.sum())
        base = np.cumsum([0, *(len(text) + 1 for text in texts)])  # a line each
        begins = offset + np.repeat(base[:-1], lengths)  # in characters of all lines

        # Of every character whether a word begins there: 1 or 0, or -1 for what the vocabulary says.
        begun = np.full(base[-1], -1 if self.cut is None else 0, np.int8)
        if self.cut is not None:
            sizes = np.fromiter((len(piece) for some in pieces for piece in (*some, "\n")), np.int64)
            begun[np.append(0, np.cumsum(sizes)[:-1])] = 1
        if self.dictionary is not None:
            for start, end in self.dictionary.find("\n".join(texts)):
                begun[start] = begun[end] = 1  # the last text has a line end too
                begun[start + 1 : end] = 0
        said = begun[begins]
        # Tokens of bytes begin several times at one character.
        again = np.append(False, begins[1:] == begins[:-1])
        return ids, np.where(said < 0, self.continues[flat], (said == 0) | again)


def cut_at_spaces(text: str) -> list[str]:
    """The words of a text in which they stand apart, with a space between two that have one in plain text too.

    Chinese, Japanese and Korean words have none beside them.
    """
    words = text.split()
    pieces = words[:1]
    for before, word in pairwise(words):
        pieces += [word] if is_wide(before[-1]) or is_wide(word[0]) else [" ", word]
    return pieces


@functools.cache
def jieba_cutter() -> Callable[[str], list[str]]:
    """jieba's words of a text, those that it guesses too; its dictionary is read once, in a second or two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age: invalid escapes, pkg_resources
        import jieba

    tokenizer = jieba.Tokenizer()
    # What its `initialize` does, without the copy in the temporary folder, which it trusts whoever wrote it.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer.lcut
