"""Words that a list names, found in token ids: names, phrases, and words of a language that is written without spaces.

Masking takes them whole, as ERNIE does with phrases and entities, and as whole word masking does with Chinese words,
whose characters are tokens each. Source: Sun et al., "ERNIE: enhanced representation through knowledge integration"
(2019).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastbert import files
from fastbert.data.tokenizer import special_ids, vocab_size


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
    """Words as a tokenizer's ids; those of a single token, or with one that it does not know, change nothing.

    A tree with a state for every beginning of a word: `keys` has state * V + id for each way on, ascending, `following`
    the state that it leads to, and `ends` says which states are words.

    Raises:
        ValueError: no word has several tokens.
    """

    def __init__(self, words: Iterable[str], tokenizer: Tokenizer):
        self.vocab_size = vocab_size(tokenizer)
        special, ways, ends = set(special_ids(tokenizer)), {}, {0: False}
        sequences = {tuple(encoded.ids) for encoded in tokenizer.encode_batch(list(words), add_special_tokens=False)}
        for ids in sorted(sequences):
            if len(ids) < 2 or not special.isdisjoint(ids):
                continue
            state = 0
            for token in ids:
                state = ways.setdefault(state * self.vocab_size + token, len(ends))
                ends.setdefault(state, False)
            ends[state] = True
        if not ways:
            raise ValueError("no word of the dictionary has several tokens of this vocabulary, so that none is masked")
        self.keys = np.array(sorted(ways), np.int64)
        self.following = np.array([ways[key] for key in self.keys.tolist()], np.int64)
        self.ends = np.array([ends[state] for state in range(len(ends))])

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the words' ids."""
        return hashlib.sha256(self.keys.tobytes() + self.following.tobytes() + self.ends.tobytes()).hexdigest()

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """bool [T], whether a token continues a word that began before it: from left to right the longest word each.

        Args:
            ids: int64 [T] in [0, V), of any texts; no word goes on over a special token.
        """
        longest, starts, states = np.ones(len(ids), np.int64), np.arange(len(ids)), np.zeros(len(ids), np.int64)
        depth = 0
        while len(starts):
            within = starts + depth < len(ids)
            starts, states = starts[within], states[within]
            keys = states * self.vocab_size + ids[starts + depth]
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            found = self.keys[places] == keys
            starts, states = starts[found], self.following[places[found]]
            depth += 1
            longest[starts[self.ends[states]]] = depth
        result, free = np.zeros(len(ids), bool), 0
        for start in np.flatnonzero(longest > 1).tolist():
            if start >= free:
                free = start + int(longest[start])
                result[start + 1 : free] = True
        return result
