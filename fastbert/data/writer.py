"""Writing a token store: documents to numbers, in one pass, split into what is trained on and what is held out."""

import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from fastbert import files, tokenizer_files
from fastbert.data.draws import Purpose, below, draw
from fastbert.data.store import FILES, FORMAT, META, PIECE, TokenStore
from fastbert.data.tokenizer import LONGEST_WORD, fingerprint, vocab_size
from fastbert.data.words import Words
from fastbert.data.wordwise import Encoder, Ids, joined_ids

SIDES = "train", "held_out"
_CHUNK_CHARACTERS = 1 << 20  # tokenised at a time
_FEW_DOCUMENTS = 20  # of fewer two whole ones would be more than a tenth
_FEW_TOKENS = 32


@dataclass(frozen=True)
class Vocabulary:
    """What a store keeps of its tokenizer.

    Attributes:
        size: every id is below it. fingerprint: see `tokenizer.fingerprint`. special: ids of its special tokens.
        words: `Words.meta` of a store that knows of words; None without.
    """

    size: int
    fingerprint: str
    special: list[int]
    words: dict[str, Any] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, words: Words | None = None) -> "Vocabulary":
        vocab = tokenizer.get_vocab()
        special = [vocab[token] for token in tokenizer_files.special_tokens(vocab).values()]
        return cls(vocab_size(tokenizer), fingerprint(tokenizer), special, None if words is None else words.meta())

    @property
    def dtype(self) -> np.dtype:
        numbers = self.size if self.words is None else 2 * self.size
        return np.dtype(np.uint16 if numbers <= 1 << 16 else np.uint32)


Encode = Callable[[list[str]], Ids]


def encoder_of(tokenizer: Tokenizer, words: Words | None) -> Encode:
    """What gives the numbers that a store keeps of sentences; V is added to the id of a token that continues a word."""
    encoder = Encoder(tokenizer)
    if words is None:
        return encoder
    finder, size = words.finder(encoder.tokenizer), vocab_size(tokenizer)

    def encode(sentences: list[str]) -> Ids:
        ids, continued = finder.encode(sentences)
        tokens, lengths = joined_ids(ids)
        return tokens + size * continued, lengths

    return encode


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
    vocabulary = Vocabulary.of(tokenizer, words)
    bar = tqdm(documents, "tokenising", unit=" documents", disable=not progress)
    with _whole_folder(Path(folder)) as temporary:
        expect_words(write_tokenised(temporary, bar, encoder_of(tokenizer, words), vocabulary), vocabulary)


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
    check_fraction(held_out_fraction)
    vocabulary = Vocabulary.of(tokenizer, words)
    bar = tqdm(documents, "tokenising", unit=" documents", disable=not progress)
    with _whole_folder(Path(folder)) as temporary:
        sides = write_sides(temporary, bar, encoder_of(tokenizer, words), vocabulary, held_out_fraction, seed)
        expect_text(sides, vocabulary, nsp)


def check_fraction(held_out_fraction: float) -> None:
    """Raises ValueError unless it is a share that can be held out."""
    if not 0.0 < held_out_fraction <= 0.5:
        raise ValueError(
            f"held_out_fraction is the share of documents kept for evaluation: expected 0 < fraction <= 0.5, got "
            f"{held_out_fraction}"
        )


class Written(NamedTuple):
    """What a store holds: counts, and how often each id occurs, int64 [V]."""

    name: str
    tokens: int
    sentences: int
    documents: int
    counts: np.ndarray


def expect_text(sides: list[Written], vocabulary: Vocabulary, nsp: bool) -> None:
    """Raises ValueError where a side has too little to train on or to evaluate with."""
    tokens, documents = sum(side.tokens for side in sides), [side.documents for side in sides]
    if tokens and not all(side.tokens for side in sides):
        raise ValueError(f"a corpus of {tokens} token cannot be split into one part to train on and one held out")
    if tokens and nsp and min(documents) < 2:
        raise ValueError(
            "next-sentence prediction takes random sentences from other documents, so it needs two to train on and "
            f"two held out; of {sum(documents)} document(s) one side gets {min(documents)}: separate the documents of "
            "a text file by blank lines, give more text, hold out another share (--held-out), or train without it "
            "(--objective mlm+sop or mlm)"
        )
    for side in sides:
        expect_words(side, vocabulary)


def expect_words(written: Written, vocabulary: Vocabulary) -> None:
    """Raises ValueError where there is nothing to learn from."""
    if not written.tokens:
        raise ValueError(f"the documents for {written.name} hold no token: expected at least one sentence with a word")
    if written.counts[vocabulary.special].sum() == written.tokens:
        raise ValueError(
            f"all {written.tokens:,} tokens of the documents for {written.name} are [UNK] or another special one, "
            "so none can be masked and predicted: use a tokenizer that was trained on such text; a language "
            f"written without spaces needs them between its words, as more than {LONGEST_WORD} letters are [UNK]"
        )


def write_tokenised(folder: Path, documents: Iterable[list[str]], encoder: Encode, vocabulary: Vocabulary) -> Written:
    """Tokenises documents into the files of a store, which may turn out empty."""
    with _Writer(folder, vocabulary) as writer:
        for part in _tokenised_parts(documents, encoder):
            writer.append(part)
        return writer.finish()


def write_sides(
    folder: Path,
    documents: Iterable[list[str]],
    encoder: Encode,
    vocabulary: Vocabulary,
    held_out_fraction: float,
    seed: int,
    shard: int = 0,
) -> list[Written]:
    """Tokenises documents into `folder/train` and `folder/held_out`, as `write_stores` says, and either may be empty.

    Which documents are held out also depends on the number of the shard.
    """
    write_tokenised(folder / "all", documents, encoder, vocabulary)
    corpus = TokenStore.open(folder / "all", verify=False)
    corpus, held_out = _split(corpus, held_out_fraction, seed, shard)
    sides = []
    for name, chosen in zip(SIDES, (~held_out, held_out), strict=True):
        with _Writer(folder / name, vocabulary) as writer:
            for part in _chosen_parts(corpus, chosen):
                writer.append(part)
            sides.append(writer.finish())
    shutil.rmtree(folder / "all")
    return sides


class _Part(NamedTuple):
    """Some documents: their token ids [T], tokens of each sentence [S], sentences of each document [D], none 0."""

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


def _tokenised_parts(documents: Iterable[list[str]], encoder: Encode) -> Iterator[_Part]:
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
            yield from _tokenise(pending, encoder)
            pending, characters = [], 0
    yield from _tokenise(pending, encoder)


def _tokenise(documents: list[list[str]], encoder: Encode) -> Iterator[_Part]:
    if not documents:
        return
    parts = map(encoder, _slices(list(chain.from_iterable(documents))))
    tokens, lengths = map(np.concatenate, zip(*((ids.astype(np.uint32), each) for ids, each in parts), strict=True))
    document = np.repeat(np.arange(len(documents)), [len(sentences) for sentences in documents])
    filled = lengths > 0
    per_document = np.bincount(document[filled], minlength=len(documents))
    yield _Part(tokens, lengths[filled], per_document[per_document > 0])


def _slices(sentences: list[str]) -> Iterator[list[str]]:
    """The sentences of a long document, about a million characters at a time."""
    ends = np.cumsum([len(sentence) for sentence in sentences])
    first = 0
    while first < len(sentences) or not first:
        reached = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, reached + 2 * _CHUNK_CHARACTERS, "right")))
        yield sentences[first:last]
        first = last


def _chosen_parts(store: TokenStore, chosen: np.ndarray) -> Iterator[_Part]:
    """The documents of `store` where `chosen` [documents] is true, a few million tokens at a time."""
    ends = store.sentences[store.documents[1:]]  # in tokens
    first = 0
    while first < len(chosen):
        start = store.sentences[store.documents[first]]
        last = max(first + 1, int(np.searchsorted(ends, start + PIECE, "right")))
        kept, bounds = chosen[first:last], store.documents[first : last + 1]
        per_document = np.diff(bounds)
        in_kept = np.repeat(kept, per_document)
        per_sentence = np.diff(store.sentences[bounds[0] : bounds[-1] + 1])
        tokens = store.tokens[start : store.sentences[bounds[-1]]][np.repeat(in_kept, per_sentence)]
        yield _Part(tokens, per_sentence[in_kept], per_document[kept])
        first = last


class _Writer:
    """Appends documents to the files of one store, with running offsets, checksums and counts."""

    def __init__(self, folder: Path, vocabulary: Vocabulary):
        folder.mkdir(exist_ok=True)
        self.folder, self.vocabulary = folder, vocabulary
        self.tokens = self.sentences = self.documents = 0
        self.counts = np.zeros(vocabulary.size, np.int64)
        self.checksums = dict.fromkeys(FILES, 0)

    def __enter__(self) -> "_Writer":
        self.files = {name: open(self.folder / name, "wb") for name in (*FILES, META)}  # noqa: SIM115
        for name in FILES[1:]:
            self._append(name, np.zeros(1, np.int64))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # Closing a file that could not be written fails once more; the first error is the one to show.
        for file in self.files.values():
            with suppress(OSError) if kind else nullcontext():
                file.close()

    def append(self, part: _Part) -> None:
        self._append("tokens.bin", part.tokens.astype(self.vocabulary.dtype))
        self._append("sentences.bin", self.tokens + np.cumsum(part.sentences))
        self._append("documents.bin", self.sentences + np.cumsum(part.documents))
        self.tokens += len(part.tokens)
        self.sentences += len(part.sentences)
        self.documents += len(part.documents)
        for start in range(0, len(part.tokens), PIECE):
            ids = part.tokens[start : start + PIECE] % self.vocabulary.size
            self.counts += np.bincount(ids, minlength=self.vocabulary.size)

    def finish(self) -> Written:
        """Writes meta.json."""
        meta = {
            "format": FORMAT,
            "tokens": self.tokens,
            "sentences": self.sentences,
            "documents": self.documents,
            "dtype": self.vocabulary.dtype.name,
            "vocab_size": self.vocabulary.size,
            "tokenizer": self.vocabulary.fingerprint,
            "crc32": self.checksums,
        }
        if self.vocabulary.words is not None:
            meta["words"] = self.vocabulary.words
        with self._writing(META):
            self.files[META].write(files.json_text(meta, indent=2).encode())
        for name, file in self.files.items():
            with self._writing(name):
                file.flush()
        return Written(self.folder.name, self.tokens, self.sentences, self.documents, self.counts)

    def _append(self, name: str, array: np.ndarray) -> None:
        self.checksums[name] = zlib.crc32(array, self.checksums[name])
        with self._writing(name):
            self.files[name].write(array)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return files.naming(
            self.folder / name,
            "a token store takes about half the space of its text: make room and run the same command again",
        )


def _whole_folder(folder: Path) -> AbstractContextManager[Path]:
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another folder, a store is written only once")
    return files.whole_folder(folder)


def _split(corpus: TokenStore, fraction: float, seed: int, shard: int) -> tuple[TokenStore, np.ndarray]:
    """Which documents are held out, bool [documents], of a store whose last documents may have been cut for it."""
    documents = len(corpus.documents) - 1
    if documents >= _FEW_DOCUMENTS:
        return corpus, _one_of_every(min(round(1 / fraction), documents // 2), documents, seed, shard)
    total = len(corpus.tokens)
    if total < 2:
        return corpus, np.zeros(documents, bool)
    size = max(round(total * fraction), min(_FEW_TOKENS, total // 2))
    begin = _sentence_near(corpus, total - size, max(0, total - 2 * size), total - size // 2)
    middle = _sentence_near(corpus, (begin + total + 1) // 2, begin, total)
    cuts = [begin, min(middle, total)]
    sentences = np.union1d(corpus.sentences, cuts)
    bounds = np.union1d(corpus.sentences[corpus.documents], cuts)  # of documents, in tokens
    cut = replace(corpus, sentences=sentences, documents=np.searchsorted(sentences, bounds))
    return cut, bounds[:-1] >= begin


def _one_of_every(every: int, documents: int, seed: int, shard: int) -> np.ndarray:
    blocks = np.arange(-(-documents // every))
    words, *_ = draw(Purpose.SPLIT, seed, shard, blocks)
    place = blocks * every + below(words, every)
    held_out = np.zeros(documents, bool)
    held_out[place[place < documents]] = True
    return held_out


def _sentence_near(corpus: TokenStore, target: int, low: int, high: int) -> int:
    """The beginning of a sentence that is nearest to token `target` and between `low` and `high`, else `target`."""
    starts = corpus.sentences[(corpus.sentences > low) & (corpus.sentences < high)]
    return int(starts[np.abs(starts - target).argmin()]) if len(starts) else target
