"""The token store: a corpus as numbers on disk, memory-mapped, with its sentences and documents.

    tokens.bin      uint16 [tokens], uint32 where the vocabulary does not fit
    sentences.bin   int64 [sentences + 1], sentence i is tokens[sentences[i] : sentences[i + 1]]
    documents.bin   int64 [documents + 1], document i is sentences documents[i] to documents[i + 1]
    meta.json       counts, dtype, vocabulary size, the tokenizer's fingerprint, a CRC-32 of each file

Sentences without tokens and documents without sentences are left out, so all lengths are at least 1.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from fastbert import files
from fastbert.data.draws import Purpose, below, draw
from fastbert.data.tokenizer import fingerprint, vocab_size

FORMAT = 1
_FILES = ("tokens.bin", "sentences.bin", "documents.bin")
_META = "meta.json"
_CHUNK_CHARACTERS = 1 << 20  # tokenised at a time: enough for all cores, small beside the tokenizer itself
_CHUNK_BYTES = 1 << 24


def write_store(
    folder: str | Path, documents: Iterable[list[str]], tokenizer: Tokenizer, *, progress: bool = True
) -> None:
    """Tokenises `documents` into a new store; the folder appears at once when all is written, or not at all.

    Args:
        folder: must not exist.
        documents: lists of sentences, read once; memory holds about a million characters of them.
        tokenizer: no special tokens are added, and special tokens spelled out in the text are read as plain text.
        progress: shows a bar.

    Raises:
        FileExistsError: `folder` exists. ValueError: no token at all.
        OSError: the disk is full or fails; nothing is left behind.
    """
    with _new_folder(Path(folder)) as temporary, _Writer(temporary, tokenizer) as writer:
        for document in _shown(documents, progress):
            writer.add(document)
        if not writer.finish():
            raise ValueError(f"the documents for {folder} hold no token: expected at least one sentence with a word")


def write_stores(
    folder: str | Path,
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    *,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """As `write_store`, in one pass into two stores, `folder/train` and `folder/held_out`.

    Of every `round(1 / held_out_fraction)` documents one is held out; which one depends on (seed, document index).

    Raises:
        ValueError: held_out_fraction outside (0, 0.5], or no document on one of the sides; and as `write_store`.
    """
    if not 0.0 < held_out_fraction <= 0.5:
        raise ValueError(
            f"held_out_fraction is the share of documents kept for evaluation: expected 0 < fraction <= 0.5, got "
            f"{held_out_fraction}; write_store splits nothing"
        )
    every = round(1 / held_out_fraction)
    with _new_folder(Path(folder)) as temporary, ExitStack() as stack:
        train = stack.enter_context(_Writer(temporary / "train", tokenizer))
        held_out = stack.enter_context(_Writer(temporary / "held_out", tokenizer))
        for document, is_held_out in zip(_shown(documents, progress), _held_out(every, seed), strict=False):
            (held_out if is_held_out else train).add(document)
        sizes = train.finish(), held_out.finish()
        if not all(sizes):
            raise ValueError(
                f"held_out_fraction {held_out_fraction} holds out one document in {every}, and the corpus has only "
                f"{sum(sizes)}: raise the fraction, or separate the documents of a text file by blank lines"
            )


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A store opened for reading; the arrays are memory-mapped and read-only.

    Attributes:
        tokens: uint16 or uint32 [tokens].
        sentences: int64 [sentences + 1], offsets into tokens.
        documents: int64 [documents + 1], offsets into sentences.
        vocab_size: every token is below it.
        tokenizer: fingerprint of the tokenizer that wrote it.
        fingerprint: SHA-256 (hex) of meta.json's counts, tokenizer and checksums: stores of equal content share it, and
            none has to be read for it.
    """

    folder: Path
    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    vocab_size: int
    tokenizer: str
    fingerprint: str = ""

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "TokenStore":
        """Maps the store in `folder`.

        Args:
            verify: reads all files once and compares their checksums; sizes are compared in any case.

        Raises:
            FileNotFoundError: no store there. ValueError: a file is missing, cut short or changed.
        """
        folder = Path(folder)
        file = folder / _META
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no token store ({_META} is missing): write one with write_store")
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            version, vocab_size, tokenizer = meta["format"], meta["vocab_size"], meta["tokenizer"]
            counts = meta["tokens"], meta["sentences"] + 1, meta["documents"] + 1
            types = np.dtype(meta["dtype"]), np.dtype(np.int64), np.dtype(np.int64)
            checksums = [meta["crc32"][name] for name in _FILES]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): {_REWRITE}") from error
        if version != FORMAT:
            raise ValueError(f"{file} says format {version}, this version reads format {FORMAT}: {_REWRITE}")
        arrays = []
        for name, length, dtype, checksum in zip(_FILES, counts, types, checksums, strict=True):
            file = folder / name
            size = file.stat().st_size if file.is_file() else 0
            if size != length * dtype.itemsize:
                raise ValueError(f"{file} has {size:,} bytes, expected {length * dtype.itemsize:,}: {_REWRITE}")
            array = np.memmap(file, dtype, mode="r").view(np.ndarray)
            if verify and _crc32(array) != checksum:
                raise ValueError(f"{file} is damaged, its checksum differs from the one in {_META}: {_REWRITE}")
            arrays.append(array)
        content = json.dumps([vocab_size, tokenizer, counts, types[0].name, checksums])
        return cls(folder, *arrays, vocab_size, tokenizer, hashlib.sha256(content.encode()).hexdigest())

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again instead of receiving a copy of them.
        return TokenStore.open, (self.folder, False)

    def document(self, i: int) -> list[np.ndarray]:
        """The sentences of document i, each its token ids."""
        ends = self.sentences[self.documents[i] : self.documents[i + 1] + 1]
        return [self.tokens[a:b] for a, b in pairwise(ends)]

    def token_counts(self) -> Tensor:
        """How often each id occurs: int64 [vocab_size], read in pieces."""
        total = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(self.tokens), _CHUNK_BYTES):
            total += np.bincount(self.tokens[start : start + _CHUNK_BYTES], minlength=self.vocab_size)
        return torch.from_numpy(total)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless `tokenizer` is the one whose ids are in the store."""
        if fingerprint(tokenizer) != self.tokenizer:
            raise ValueError(
                f"the token store {self.folder} is of another tokenizer ({self.vocab_size} entries, this one "
                f"has {tokenizer.get_vocab_size()}): use that one, or {_REWRITE}"
            )


_REWRITE = "delete the folder and write the store again"


class _Writer:
    """Appends documents to the files of one store, with running offsets and checksums."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the next lines change it
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = vocab_size(tokenizer)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.tokens = self.sentences = self.documents = self.characters = 0
        self.pending: list[list[str]] = []
        self.checksums = dict.fromkeys(_FILES, 0)

    def __enter__(self) -> "_Writer":
        self.files = {name: open(self.folder / name, "wb") for name in (*_FILES, _META)}  # noqa: SIM115
        for name in _FILES[1:]:
            self._append(name, np.zeros(1, np.int64))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # Closing a file that could not be written fails once more; the first error is the one to show.
        for file in self.files.values():
            with suppress(OSError) if kind else nullcontext():
                file.close()

    def add(self, document: list[str]) -> None:
        self.pending.append(document)
        self.characters += sum(map(len, document))
        if self.characters >= _CHUNK_CHARACTERS:
            self._flush()

    def finish(self) -> int:
        """Writes what is left and meta.json; returns the number of documents."""
        self._flush()
        meta = {
            "format": FORMAT,
            "tokens": self.tokens,
            "sentences": self.sentences,
            "documents": self.documents,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": fingerprint(self.tokenizer),
            "crc32": self.checksums,
        }
        with self._writing(_META):
            self.files[_META].write(files.json_text(meta, indent=2).encode())
        for name, file in self.files.items():
            with self._writing(name):
                file.flush()
                os.fsync(file.fileno())
        return self.documents

    def _flush(self) -> None:
        encodings = self.tokenizer.encode_batch_fast(list(chain.from_iterable(self.pending)), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), self.dtype, lengths.sum())
        document = np.repeat(np.arange(len(self.pending)), [len(sentences) for sentences in self.pending])
        filled = lengths > 0
        per_document = np.bincount(document[filled], minlength=len(self.pending))
        per_document = per_document[per_document > 0]
        self._append("tokens.bin", tokens)
        self._append("sentences.bin", self.tokens + np.cumsum(lengths[filled]))
        self._append("documents.bin", self.sentences + np.cumsum(per_document))
        self.tokens += len(tokens)
        self.sentences += int(filled.sum())
        self.documents += len(per_document)
        self.pending, self.characters = [], 0

    def _append(self, name: str, array: np.ndarray) -> None:
        self.checksums[name] = zlib.crc32(array, self.checksums[name])
        with self._writing(name):
            self.files[name].write(array)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return files.naming(
            self.folder / name,
            "nothing is left of the token store, which takes about half the space of its text",
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and is removed when it does not."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another folder, a store is written only once")
    temporary = folder.with_name(f".{folder.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _held_out(every: int, seed: int) -> Iterator[bool]:
    """For document after document whether it is held out, one of every `every`."""
    for first in count(step=1024):
        words, *_ = draw(Purpose.SPLIT, seed, 0, np.arange(first, first + 1024))
        for chosen in below(words, every).tolist():
            for place in range(every):
                yield place == chosen


def _shown(documents: Iterable[list[str]], progress: bool) -> Iterable[list[str]]:
    return tqdm(documents, desc="tokenising", unit=" documents", disable=not progress)


def _crc32(array: np.ndarray) -> int:
    data, checksum = memoryview(array).cast("B"), 0
    for start in range(0, len(data), _CHUNK_BYTES):
        checksum = zlib.crc32(data[start : start + _CHUNK_BYTES], checksum)
    return checksum
