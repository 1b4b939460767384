"""The token store: a corpus as numbers on disk, memory-mapped, with its sentences and documents.

    tokens.bin      uint16 [tokens], uint32 where the vocabulary does not fit; in a store with words V is added to the
                    id of a token that goes on with the word of the one before
    sentences.bin   int64 [sentences + 1], sentence i is tokens[sentences[i] : sentences[i + 1]]
    documents.bin   int64 [documents + 1], document i is sentences documents[i] to documents[i + 1]
    meta.json       counts, dtype, vocabulary size, the tokenizer's fingerprint, a CRC-32 of each file

Sentences without tokens and documents without sentences are left out, so all lengths are at least 1. A large corpus is
several such folders, its shards, which are read as one store; see `fastbert.data.shards`.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.tokenizer import fingerprint
from fastbert.data.words import Words

FORMAT = 1
FILES = ("tokens.bin", "sentences.bin", "documents.bin")
META = "meta.json"
PIECE = 1 << 22  # tokens, or bytes, looked at together
_AGAIN = "delete the folder and prepare the text again"
REWRITE = f"put back what is missing or damaged, or {_AGAIN}"


class Joined:
    """Arrays of several shards, read as one: the i-th element, elements by their places, a slice, a sorted search.

    Places are integers, from the end where they are negative; IndexError beyond, or for anything else.

    Args:
        parts: 1-dimensional, of one dtype, none empty.
        offsets: they are offsets, of which each shard's begin with 0: those of one go on where the last one's end, and
            the first of all but the first shard is left out.
    """

    def __init__(self, parts: Sequence[np.ndarray], offsets: bool = False):
        self.parts, self.offsets = parts, offsets
        lengths = [len(part) - offsets for part in parts]
        self.first = np.cumsum([0, *lengths[:-1]])  # place of each part's first element
        self.base = np.cumsum([0, *(int(part[-1]) for part in parts[:-1])]) if offsets else np.zeros(len(parts), int)
        self.length = sum(lengths) + offsets
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, slice):
            start, end, step = places.indices(self.length)
            if step != 1:
                raise IndexError(f"a slice of several shards has step 1, got {step}: slice what it gives once more")
            return self._slice(start, end)
        places = np.asarray(places)
        integers = places.dtype.kind in "iu" or not places.size
        if not integers or places.min(initial=0) < -self.length or places.max(initial=-1) >= self.length:
            raise IndexError(f"places are integers from {-self.length} to {self.length - 1}: got {places}")
        which = np.searchsorted(self.first, np.where(places < 0, places + self.length, places), "right") - 1
        return self._by_part(places % self.length, which, lambda part, own: part[own], self.first, self.base)

    def searchsorted(self, values: Any, side: str = "left") -> Any:
        """As of numpy's arrays; for offsets."""
        values = np.asarray(values)
        which = np.maximum(np.searchsorted(self.base, values, side) - 1, 0)
        return self._by_part(values, which, lambda part, own: part.searchsorted(own, side), self.base, self.first)

    def _by_part(self, given: np.ndarray, which: np.ndarray, look_up: Any, less: np.ndarray, more: np.ndarray) -> Any:
        """`look_up` in the part of each, of what is given without what the parts before it have, which is added."""
        flat, part_of = given.ravel(), which.ravel()
        if not len(flat):
            return np.zeros(given.shape, self.dtype)
        order = np.argsort(part_of, kind="stable")
        bounds = np.flatnonzero(np.diff(part_of[order], prepend=-1, append=-1))
        found = np.empty(len(flat), np.int64)
        for start, end in pairwise(bounds):
            own, k = order[start:end], part_of[order[start]]
            found[own] = look_up(self.parts[k], flat[own] - less[k]) + more[k]
        return found.reshape(given.shape)[()].astype(self.dtype if less is self.first else np.int64)

    def _slice(self, start: int, end: int) -> np.ndarray:
        pieces = []
        first = max(0, int(np.searchsorted(self.first, start, "right")) - 1)
        for k in range(first, len(self.parts)):
            if self.first[k] >= end and pieces:
                break
            part = self.parts[k][max(0, start - self.first[k]) : max(0, end - self.first[k])]
            last = k == len(self.parts) - 1
            part = part if last or not self.offsets else part[: len(self.parts[k]) - 1 - max(0, start - self.first[k])]
            pieces.append(part + self.base[k] if self.offsets else part)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A store opened for reading; the arrays are memory-mapped and read-only, or `Joined` of such.

    Attributes:
        tokens: uint16 or uint32 [tokens]; with words as in the file, see `ids_and_words`.
        sentences: int64 [sentences + 1], offsets into tokens.
        documents: int64 [documents + 1], offsets into sentences.
        vocab_size: every token is below it.
        tokenizer: fingerprint of the tokenizer that wrote it.
        fingerprint: SHA-256 (hex) of meta.json's counts, tokenizer and checksums: stores of equal content share it, and
            none has to be read for it.
        words: what its words are (`Words.meta`); None where it knows of none but the vocabulary's pieces.
        counts: how often each id occurs, int64 [vocab_size], where that was counted before; None where it was not.
        reopen: a function and its arguments that give the same store again, for another process.
    """

    folder: Path
    tokens: np.ndarray | Joined
    sentences: np.ndarray | Joined
    documents: np.ndarray | Joined
    vocab_size: int
    tokenizer: str
    fingerprint: str = ""
    words: dict[str, Any] | None = None
    counts: np.ndarray | None = None
    reopen: tuple[Any, tuple[Any, ...]] | None = None

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "TokenStore":
        """Maps the store in `folder`.

        Args:
            verify: reads all files once and compares their checksums; sizes are compared in any case.

        Raises:
            FileNotFoundError: no store there. ValueError: a file is missing, cut short or changed.
        """
        folder = Path(folder)
        file = folder / META
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no token store ({META} is missing): {REWRITE}")
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            version, vocab_size, tokenizer = meta["format"], meta["vocab_size"], meta["tokenizer"]
            words = meta.get("words")
            counts = meta["tokens"], meta["sentences"] + 1, meta["documents"] + 1
            types = np.dtype(meta["dtype"]), np.dtype(np.int64), np.dtype(np.int64)
            checksums = [meta["crc32"][name] for name in FILES]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): {REWRITE}") from error
        if version != FORMAT:
            raise ValueError(f"{file} says format {version}, this version reads format {FORMAT}: {_AGAIN}")
        arrays = []
        for name, length, dtype, checksum in zip(FILES, counts, types, checksums, strict=True):
            file = folder / name
            size = file.stat().st_size if file.is_file() else 0
            if size != length * dtype.itemsize:
                raise ValueError(f"{file} has {size:,} bytes, expected {length * dtype.itemsize:,}: {REWRITE}")
            array = np.memmap(file, dtype, mode="r").view(np.ndarray) if length else np.empty(0, dtype)
            if verify and _crc32(array) != checksum:
                raise ValueError(f"{file} is damaged, its checksum differs from the one in {META}: {REWRITE}")
            arrays.append(array)
        content = json.dumps([vocab_size, tokenizer, counts, types[0].name, checksums, *([words] if words else [])])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return cls(folder, *arrays, vocab_size, tokenizer, digest, words, reopen=(cls.open, (folder, False)))

    @classmethod
    def join(cls, folder: Path, shards: Sequence["TokenStore"], reopen: Any, counts: np.ndarray) -> "TokenStore":
        """Stores of one tokenizer, at least one with tokens, as one whose documents are theirs in a row."""
        content = hashlib.sha256("".join(shard.fingerprint for shard in shards).encode()).hexdigest()
        filled = [shard for shard in shards if len(shard.tokens)]
        one = filled[0]
        if len(filled) == 1:
            arrays = one.tokens, one.sentences, one.documents
        else:
            arrays = (
                Joined([shard.tokens for shard in filled]),
                Joined([shard.sentences for shard in filled], offsets=True),
                Joined([shard.documents for shard in filled], offsets=True),
            )
        return cls(folder, *arrays, one.vocab_size, one.tokenizer, content, one.words, counts, reopen)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again instead of receiving a copy of them.
        return self.reopen or (TokenStore.open, (self.folder, False))

    def document(self, i: int) -> list[np.ndarray]:
        """The sentences of document i, each its token ids."""
        first, end = self.documents[np.array([i, i + 1])]
        return [self.ids_and_words(self.tokens[a:b])[0] for a, b in pairwise(self.sentences[first : end + 1])]

    def ids_and_words(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of some of its tokens, of their shape and dtype, and whether each goes on with the word before, bool.

        The latter is None in a store without words.
        """
        if self.words is None:
            return tokens, None
        continued = tokens >= self.vocab_size
        return np.where(continued, tokens - tokens.dtype.type(self.vocab_size), tokens), continued

    def shards(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each shard the number of its first token, its sentences and its documents, each counted from 0."""
        if isinstance(self.sentences, Joined):
            yield from zip(self.sentences.base.tolist(), self.sentences.parts, self.documents.parts, strict=True)
        else:
            yield 0, self.sentences, self.documents

    def token_counts(self) -> np.ndarray:
        """How often each id occurs: int64 [vocab_size]; of one that was not counted before, read in pieces."""
        if self.counts is not None:
            return self.counts
        total = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(self.tokens), PIECE):
            ids, _ = self.ids_and_words(self.tokens[start : start + PIECE])
            total += np.bincount(ids, minlength=self.vocab_size)
        return total

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless `tokenizer` is the one whose ids are in the store."""
        if fingerprint(tokenizer) != self.tokenizer:
            raise ValueError(
                f"the token store {self.folder} is of another tokenizer ({self.vocab_size} entries, this one "
                f"has {tokenizer.get_vocab_size()}): use that one, or {_AGAIN}"
            )

    def check_words(self, words: Words | None) -> None:
        """Raises ValueError unless the store knows of these words."""
        if self.words != (None if words is None else words.meta()):
            raise ValueError(
                f"the token store {self.folder} was written with other words (--words, --dictionary) than these: use "
                f"those, or {_AGAIN}"
            )


def _crc32(array: np.ndarray) -> int:
    data, checksum = memoryview(array).cast("B"), 0
    for start in range(0, len(data), PIECE):
        checksum = zlib.crc32(data[start : start + PIECE], checksum)
    return checksum
