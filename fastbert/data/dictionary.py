"""Words that a list names, found in text: names, phrases, and words of a language that is written without spaces.

Masking takes them whole, as ERNIE does with phrases and entities, and as whole word masking does with Chinese words,
whose characters are tokens each. Source: Sun et al., "ERNIE: enhanced representation through knowledge integration"
(2019).
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from fastbert import files
from fastbert.data.tokenizer import is_wide, special_ids


def read_words(path: str | Path) -> list[str]:
    """The words or phrases of a UTF-8 file, one a line, without white space around them.

    Raises:
        OSError: there is no such file. ValueError: it is not UTF-8, or has no word.
    """
    path = Path(path)
    with files.naming(path):
        content = path.read_bytes()
    try:
        words = [word for line in content.decode("utf-8-sig").splitlines() if (word := line.strip())]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8, a word a line") from error
    if not words:
        raise ValueError(f"{path} has no word: expected one a line")
    return words


class Dictionary:
    """Finds words in text in one pass, however many there are (Aho and Corasick, 1975).

    Text and words are compared as the tokenizer sees them, character by character: a vocabulary in lower case finds
    "New York" in "NEW YORK".

    Args:
        words: the words, one of several characters at least; those of one change nothing.
        tokenizer: its normalisation decides which characters are the same.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer):
        import ahocorasick_rs

        self.folded = _Folded(tokenizer)
        several = sorted({word.translate(self.folded) for word in words if len(word) > 1})
        self.matcher = ahocorasick_rs.AhoCorasick(several, matchkind=ahocorasick_rs.MatchKind.Standard)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where words begin and end in the text: from left to right the longest each, none over another.

        A match does not begin or end within a word of a script that is written with spaces: "New York" is not in "New
        Yorkers".
        """
        text = text.translate(self.folded)
        found = self.matcher.find_matches_as_indexes(text, overlapping=True)
        spans, free = [], 0
        for start, end in sorted(((start, end) for _, start, end in found), key=lambda span: (span[0], -span[1])):
            if start >= free and not (_joined(text, start) or _joined(text, end)):
                spans.append((start, end))
                free = end
        return spans


class _Folded(dict[int, str]):
    """What each character becomes for the tokenizer, for `str.translate`; itself where that is not one character."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.normalizer = tokenizer.normalizer

    def __missing__(self, code: int) -> str:
        character = chr(code)
        seen = character if self.normalizer is None else self.normalizer.normalize_str(character).strip()
        self[code] = seen if len(seen) == 1 else character
        return self[code]


def _joined(text: str, place: int) -> bool:
    """Whether the characters on both sides of a place are letters or digits of one word."""
    return 0 < place < len(text) and _is_of_a_word(text[place - 1]) and _is_of_a_word(text[place])


def _is_of_a_word(character: str) -> bool:
    return unicodedata.category(character) in ("Lu", "Ll", "Lt", "Nd") and not is_wide(character)


def say_what_is_not_found(words: Sequence[str], tokenizer: Tokenizer) -> str | None:
    """A line about the words that cannot be masked whole, because of the vocabulary; None where all can.

    A word of one token is masked as it is without a dictionary. One with a character that the vocabulary lacks falls
    apart there, as [UNK] is never masked.
    """
    unk, encoded = special_ids(tokenizer).unk, tokenizer.encode_batch(list(words), add_special_tokens=False)
    single = [word for word, each in zip(words, encoded, strict=True) if len(each.ids) < 2 and unk not in each.ids]
    unknown = [word for word, each in zip(words, encoded, strict=True) if unk in each.ids]
    kinds = (single, "are one token anyway"), (unknown, "have a character that the vocabulary lacks")
    said = [f"{len(some):,} {what}, such as {', '.join(some[:5])}" for some, what in kinds if some]
    return f"of the dictionary's {len(words):,} words {'; '.join(said)}" if said else None
