"""Sentences out of plain text, in time linear in its length whatever the text is."""

import re

_LINE_END = re.compile(r"\n|<br\s*+/?>", re.IGNORECASE)
# Terminators, closing quotes, a space and the next sentence's first character. A run of terminators is tried at its
# first one alone and never given back, so that a million full stops are one try. The set comes first and what may not
# stand before it second, as `re` then looks for the set alone, which is faster.
_LATIN = r"""([.!?](?<![.!?]{2})[.!?]*+)["'”’»)\]]*+(?=\s++(\S))"""
_LATIN_END = re.compile(_LATIN)
# Chinese and Japanese need no space.
_WIDE_STOPS = "。！？｡"
_ANY_END = re.compile(rf"""{_LATIN}|[{_WIDE_STOPS}]++["'”’」』）》】)]*+""")
_ABBREVIATIONS = frozenset(
    [
        "mr", "mrs", "ms", "dr", "prof", "st", "rev", "gen", "col", "sgt", "lt", "capt", "sen", "rep", "gov", "vs",
        "cf", "fig",
    ]
)  # fmt: skip
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*+[^\W\d_]")  # J, e.g, U.S


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`, stripped, none empty.

    A sentence ends at a line end, at an HTML `<br>`, after `.`, `!` or `?` (and closing quotes) followed by a space and
    anything but a lower-case letter, after a terminator that stands alone between spaces (text that was tokenised
    before), and after `。`, `！` or `？`. None ends at the full stop of a common abbreviation or of initials (`Mr.`,
    `e.g.`, `J.`).
    """
    sentences = []
    for line in _LINE_END.split(text) if "<" in text else text.split("\n"):
        start = 0
        wide = not line.isascii() and any(stop in line for stop in _WIDE_STOPS)
        for match in (_ANY_END if wide else _LATIN_END).finditer(line):
            if match[1] and not _is_end(line, start, match):
                continue
            sentences.append(line[start : match.end()].strip())
            start = match.end()
        if rest := line[start:].strip():
            sentences.append(rest)
    return sentences


def _is_end(line: str, start: int, match: re.Match) -> bool:
    stop, following, at = match[1], match[2], match.start()
    if len(stop) == 1 and line[at - 1 : at].isspace():
        return True
    if following.islower():
        return False
    if stop != ".":
        return True
    words = line[max(start, at - 16) : at].split()
    word = words[-1].lstrip("\"'“‘«([") if words else ""
    return word == "I" or not (word.lower() in _ABBREVIATIONS or _INITIALS.fullmatch(word))
