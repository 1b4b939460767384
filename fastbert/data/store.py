"""The token store: a corpus as numbers on disk, memory-mapped, with its sentences and documents.

    tokens.bin      uint16 [tokens], uint32 where the vocabulary does not fit; in a store with words V is added to the
                    id of a token that goes on with the word of the one before
    sentences.bin   int64 [sentences + 1], sentence i is tokens[sentences[i] : sentences[i + 1]]
    documents.bin   int64 [documents + 1], document i is sentences documents[i] to documents[i + 1]
    meta.json       counts, dtype, vocabulary size, the tokenizer's fingerprint, a CRC-32 of each file

Sentences without tokens and documents without sentences are left out, so all lengths are at least 1.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from fastbert import files
from fastbert.data.draws import Purpose, below, draw
from fastbert.data.tokenizer import LONGEST_WORD, fingerprint, vocab_size
from fastbert.data.words import WordFinder, Words
from fastbert.models import tokenizer_files

FORMAT = 1
_FILES = ("tokens.bin", "sentences.bin", "documents.bin")
_META = "meta.json"
_CHUNK_CHARACTERS = 1 << 20  # tokenised at a time: enough for all cores, small beside the tokenizer itself
_CHUNK_BYTES = 1 << 24
_FEW_DOCUMENTS = 20  # of fewer two whole ones would be more than a tenth
_FEW_TOKENS = 32


def write_store(
    folder: str | Path,
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    *,
    words: Words | None = None,
    progress: bool = True,
) -> None:
    """Tokenises `documents` into a new store; the folder appears at once when all is written, or not at all.

    Args:
        folder: must not exist.
        documents: lists of sentences, read once; memory holds about a million characters of them.
        tokenizer: no special tokens are added, and special tokens spelled out in the text are read as plain text.
        words: what the store shall know of words beside the vocabulary's pieces.
        progress: shows a bar.

    Raises:
        FileExistsError: `folder` exists. ValueError: no token at all, or none but special ones such as [UNK].
        OSError: the disk is full or fails; nothing is left behind.
    """
    with _whole_folder(Path(folder)) as temporary:
        _write_tokenised(temporary, documents, tokenizer, words, progress)


def write_stores(
    folder: str | Path,
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    *,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    nsp: bool = False,
    words: Words | None = None,
    progress: bool = True,
) -> None:
    """As `write_store`, into two stores, `folder/train` and `folder/held_out`; on the way it takes their size twice.

    Of every `round(1 / held_out_fraction)` documents one is held out; which one depends on (seed, document index). Of
    20 documents or more at least two are, where that fraction gives fewer. Of a smaller corpus the end is held out:
    that share of its tokens, from about 32 on (half, where it has fewer than 64), as two documents that begin where
    sentences do.

    Args:
        nsp: refuses a corpus too small for next-sentence prediction, which needs two documents on either side.

    Raises:
        ValueError: held_out_fraction outside (0, 0.5]; too few tokens or documents for two stores; a side without any
            token but special ones; and as `write_store`.
    """
    if not 0.0 < held_out_fraction <= 0.5:
        raise ValueError(
            f"held_out_fraction is the share of documents kept for evaluation: expected 0 < fraction <= 0.5, got "
            f"{held_out_fraction}; write_store splits nothing"
        )
    with _whole_folder(Path(folder)) as temporary:
        _write_tokenised(temporary / "all", documents, tokenizer, words, progress)
        corpus = TokenStore.open(temporary / "all", verify=False)
        corpus, held_out = _split(corpus, held_out_fraction, seed)
        sides = {"train": ~held_out, "held_out": held_out}
        if nsp and (fewest := min(side.sum() for side in sides.values())) < 2:
            raise ValueError(
                "next-sentence prediction takes random sentences from other documents, so it needs two to train on and "
                f"two held out; of {len(held_out)} document(s) one side gets {fewest}: separate the documents of a "
                "text file by blank lines, give more text, hold out another share (--held-out), or train without it "
                "(--objective mlm+sop or mlm)"
            )
        for name, chosen in sides.items():
            with _Writer(temporary / name, tokenizer, words) as writer:
                for part in _chosen_parts(corpus, chosen):
                    writer.append(*part)
                writer.finish()
        shutil.rmtree(temporary / "all")


def _write_tokenised(
    folder: Path, documents: Iterable[list[str]], tokenizer: Tokenizer, words: Words | None, progress: bool
) -> None:
    documents = tqdm(documents, "tokenising", unit=" documents", disable=not progress)
    with _Writer(folder, tokenizer, words) as writer:
        for part in _tokenised_parts(documents, tokenizer, words):
            writer.append(*part)
        writer.finish()


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A store opened for reading; the arrays are memory-mapped and read-only.

    Attributes:
        tokens: uint16 or uint32 [tokens]; with words as in the file, see `ids_and_words`.
        sentences: int64 [sentences + 1], offsets into tokens.
        documents: int64 [documents + 1], offsets into sentences.
        vocab_size: every token is below it.
        tokenizer: fingerprint of the tokenizer that wrote it.
        words: what its words are (`Words.meta`); None where it knows of none but the vocabulary's pieces.
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
    words: dict[str, Any] | None = None

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
            words = meta.get("words")
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
        content = json.dumps([vocab_size, tokenizer, counts, types[0].name, checksums, *([words] if words else [])])
        return cls(folder, *arrays, vocab_size, tokenizer, hashlib.sha256(content.encode()).hexdigest(), words)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again instead of receiving a copy of them.
        return TokenStore.open, (self.folder, False)

    def document(self, i: int) -> list[np.ndarray]:
        """The sentences of document i, each its token ids."""
        ends = self.sentences[self.documents[i] : self.documents[i + 1] + 1]
        return [self.ids_and_words(self.tokens[a:b])[0] for a, b in pairwise(ends)]

    def ids_and_words(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of some of its tokens, of their shape and dtype, and whether each goes on with the word before, bool.

        The latter is None in a store without words.
        """
        if self.words is None:
            return tokens, None
        continued = tokens >= self.vocab_size
        return np.where(continued, tokens - tokens.dtype.type(self.vocab_size), tokens), continued

    def token_counts(self) -> Tensor:
        """How often each id occurs: int64 [vocab_size], read in pieces."""
        total = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(self.tokens), _CHUNK_BYTES):
            ids, _ = self.ids_and_words(self.tokens[start : start + _CHUNK_BYTES])
            total += np.bincount(ids, minlength=self.vocab_size)
        return torch.from_numpy(total)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless `tokenizer` is the one whose ids are in the store."""
        if fingerprint(tokenizer) != self.tokenizer:
            raise ValueError(
                f"the token store {self.folder} is of another tokenizer ({self.vocab_size} entries, this one "
                f"has {tokenizer.get_vocab_size()}): use that one, or {_REWRITE}"
            )

    def check_words(self, words: Words | None) -> None:
        """Raises ValueError unless the store knows of these words."""
        if self.words != (None if words is None else words.meta()):
            raise ValueError(
                f"the token store {self.folder} was written with other words (--words, --dictionary) than these: use "
                f"those, or {_REWRITE}"
            )


_REWRITE = "delete the folder and write the store again"


class _Part(NamedTuple):
    """Some documents: their token ids [T], tokens of each sentence [S], sentences of each document [D], none 0."""

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


def _tokenised_parts(documents: Iterable[list[str]], tokenizer: Tokenizer, words: Words | None) -> Iterator[_Part]:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the next lines change it
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    finder = None if words is None else words.finder(tokenizer)
    pending: list[list[str]] = []
    characters = 0
    for document in documents:
        if isinstance(document, str):
            raise TypeError(
                "documents are lists of sentences, and a string came in place of one: split_sentences makes the list"
            )
        pending.append(document)
        characters += sum(map(len, document))
        if characters >= _CHUNK_CHARACTERS:
            yield _tokenise(pending, tokenizer, finder)
            pending, characters = [], 0
    yield _tokenise(pending, tokenizer, finder)


def _tokenise(documents: list[list[str]], tokenizer: Tokenizer, finder: WordFinder | None) -> _Part:
    texts = list(chain.from_iterable(documents))
    if finder is None:
        ids = [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        ids, continued = finder.encode(texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
    if finder is not None:
        tokens += vocab_size(tokenizer) * continued
    document = np.repeat(np.arange(len(documents)), [len(sentences) for sentences in documents])
    filled = lengths > 0
    per_document = np.bincount(document[filled], minlength=len(documents))
    return _Part(tokens, lengths[filled], per_document[per_document > 0])


def _chosen_parts(store: "TokenStore", chosen: np.ndarray) -> Iterator[_Part]:
    """The documents of `store` where `chosen` [documents] is true, a few million tokens at a time."""
    ends = store.sentences[store.documents[1:]]  # in tokens
    first = 0
    while first < len(chosen):
        start = store.sentences[store.documents[first]]
        last = max(first + 1, int(np.searchsorted(ends, start + _CHUNK_BYTES, "right")))
        kept, bounds = chosen[first:last], store.documents[first : last + 1]
        per_document = np.diff(bounds)
        in_kept = np.repeat(kept, per_document)
        per_sentence = np.diff(store.sentences[bounds[0] : bounds[-1] + 1])
        tokens = store.tokens[start : store.sentences[bounds[-1]]][np.repeat(in_kept, per_sentence)]
        yield _Part(tokens, per_sentence[in_kept], per_document[kept])
        first = last


class _Writer:
    """Appends documents to the files of one store, with running offsets and checksums."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, words: Words | None):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.tokenizer = fingerprint(tokenizer)
        vocab = tokenizer.get_vocab()
        self.special = [vocab[token] for token in tokenizer_files.special_tokens(vocab).values()]
        self.vocab_size = vocab_size(tokenizer)
        self.words = None if words is None else words.meta()
        numbers = self.vocab_size if words is None else 2 * self.vocab_size
        self.dtype = np.dtype(np.uint16 if numbers <= 1 << 16 else np.uint32)
        self.tokens = self.sentences = self.documents = 0
        self.has_words = False
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

    def append(self, tokens: np.ndarray, sentences: np.ndarray, documents: np.ndarray) -> None:
        """Appends a `_Part`."""
        self._append("tokens.bin", tokens.astype(self.dtype))
        self._append("sentences.bin", self.tokens + np.cumsum(sentences))
        self._append("documents.bin", self.sentences + np.cumsum(documents))
        self.tokens += len(tokens)
        self.sentences += len(sentences)
        self.documents += len(documents)
        self.has_words = self.has_words or not np.isin(tokens % self.vocab_size, self.special).all()

    def finish(self) -> None:
        """Writes meta.json; ValueError where there is nothing to learn from."""
        if not self.tokens:
            raise ValueError(
                f"the documents for {self.folder.name} hold no token: expected at least one sentence with a word"
            )
        if not self.has_words:
            raise ValueError(
                f"all {self.tokens:,} tokens of the documents for {self.folder.name} are [UNK] or another special one, "
                "so none can be masked and predicted: use a tokenizer that was trained on such text; a language "
                f"written without spaces needs them between its words, as more than {LONGEST_WORD} letters are [UNK]"
            )
        meta = {
            "format": FORMAT,
            "tokens": self.tokens,
            "sentences": self.sentences,
            "documents": self.documents,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "crc32": self.checksums,
        }
        if self.words is not None:
            meta["words"] = self.words
        with self._writing(_META):
            self.files[_META].write(files.json_text(meta, indent=2).encode())
        for name, file in self.files.items():
            with self._writing(name):
                file.flush()

    def _append(self, name: str, array: np.ndarray) -> None:
        self.checksums[name] = zlib.crc32(array, self.checksums[name])
        with self._writing(name):
            self.files[name].write(array)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return files.naming(
            self.folder / name,
            "nothing is left of the token store, which takes about half the space of its text",
        )


def _whole_folder(folder: Path) -> AbstractContextManager[Path]:
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another folder, a store is written only once")
    return files.whole_folder(folder)


def _split(corpus: "TokenStore", fraction: float, seed: int) -> tuple["TokenStore", np.ndarray]:
    """Which documents are held out, bool [documents], of a store whose last documents may have been cut for it."""
    documents = len(corpus.documents) - 1
    if documents >= _FEW_DOCUMENTS:
        return corpus, _one_of_every(min(round(1 / fraction), documents // 2), documents, seed)
    total = len(corpus.tokens)
    if total < 2:
        raise ValueError(f"a corpus of {total} token cannot be split into one part to train on and one held out")
    size = max(round(total * fraction), min(_FEW_TOKENS, total // 2))
    begin = _sentence_near(corpus, total - size, max(0, total - 2 * size), total - size // 2)
    middle = _sentence_near(corpus, (begin + total + 1) // 2, begin, total)
    cuts = [begin, min(middle, total)]
    sentences = np.union1d(corpus.sentences, cuts)
    bounds = np.union1d(corpus.sentences[corpus.documents], cuts)  # of documents, in tokens
    cut = replace(corpus, sentences=sentences, documents=np.searchsorted(sentences, bounds))
    return cut, bounds[:-1] >= begin


def _one_of_every(every: int, documents: int, seed: int) -> np.ndarray:
    blocks = np.arange(-(-documents // every))
    words, *_ = draw(Purpose.SPLIT, seed, 0, blocks)
    place = blocks * every + below(words, every)
    held_out = np.zeros(documents, bool)
    held_out[place[place < documents]] = True
    return held_out


def _sentence_near(corpus: "TokenStore", target: int, low: int, high: int) -> int:
    """The beginning of a sentence that is nearest to token `target` and between `low` and `high`, else `target`."""
    starts = corpus.sentences[(corpus.sentences > low) & (corpus.sentences < high)]
    return int(starts[np.abs(starts - target).argmin()]) if len(starts) else target


def _crc32(array: np.ndarray) -> int:
    data, checksum = memoryview(array).cast("B"), 0
    for start in range(0, len(data), _CHUNK_BYTES):
        checksum = zlib.crc32(data[start : start + _CHUNK_BYTES], checksum)
    return checksum
