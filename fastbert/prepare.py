"""From raw text to a token store that runs train from: what `fastbert prepare` does."""

import dataclasses
import os
from pathlib import Path

from tokenizers import Tokenizer
from tyro.conf import Positional

from fastbert import lock
from fastbert.data.byte_bpe import train_byte_bpe
from fastbert.data.corpus import Reading, check_corpus, iter_documents
from fastbert.data.dictionary import read_words
from fastbert.data.shard_writer import prepare_store, what_is_there
from fastbert.data.shards import PLAN, TOKENIZER, is_store, open_stores, read_index, read_tokenizer
from fastbert.data.tables import Quoting
from fastbert.data.tokenizer import load_tokenizer, train_tokenizer
from fastbert.data.unigram import train_unigram
from fastbert.data.words import Segmentation, Words
from fastbert.data.writer import check_fraction

TRAINERS = {"wordpiece": train_tokenizer, "unigram": train_unigram, "bpe": train_byte_bpe}


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a token store that fastbert pretrain --store trains from.

    It can be stopped at any time: the same command goes on with the shards that are missing. The bytes of the store
    do not depend on the number of workers."""

    corpus: Positional[Path | None] = None
    """A text file (one sentence or more per line, blank lines between documents), a table (CSV, TSV, JSON lines,
    Parquet) with --column, or a folder of such; .gz and .zst are decompressed."""
    output: Path | None = None
    """The store's folder."""
    tokenizer: str | None = None
    """A folder with a tokenizer, of this program or of transformers; or wordpiece, unigram or bpe, to train one on the
    corpus. If not given, wordpiece; with --add the store's."""
    vocab_size: int = 8192
    """Entries of the vocabulary, where one is trained."""
    lowercase: bool = True
    """Lower-case the text and strip accents, where a tokenizer is trained."""
    add: bool = False
    """Add to a finished store, whose shards stay as they are."""
    verify: bool = False
    """Read the finished store in --output once and compare all checksums, and do nothing else."""

    column: str | None = None
    """The table's column, or the JSON objects' field, that holds the text; every row is a document."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double ("" for a quote within), backslash, none; auto looks at the header."""

    words: Segmentation | None = None
    """Where the words of a text are that its tokenizer does not show, for maskings of words: jieba, by that library, of
    Chinese; spaces, as they stand apart in a text of a language that is written without."""
    dictionary: Path | None = None
    """A file of words or names, one a line, that count as one word each."""

    held_out: float = 0.02
    """Share of the documents kept for evaluation."""
    seed: int = 0
    """Decides which."""
    workers: int | None = None
    """Processes that work at the same time; if not given as many as this process may use cores."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://node1:8786, whose workers do it; they see the corpus and --output by
    the same paths."""


def prepare(config: PrepareConfig) -> Path:
    """Writes or adds to the store in `config.output`, or verifies it.

    Returns:
        The store's folder.

    Raises:
        ValueError, OSError, ImportError: what does not hold; the message says what to do.
    """
    _check(config)
    if config.verify:
        train, held_out = open_stores(config.output, verify=True)
        tokens = len(train.tokens) + len(held_out.tokens)
        print(f"{config.output} is whole: the checksums of its {tokens:,} tokens hold")
        return config.output
    print(check_corpus(config.corpus, config.column, separator=config.separator, quoting=config.quoting))
    words = _words(config)
    with lock.hold(config.output, "writes there", "the same command goes on where it was"):
        tokenizer = _tokenizer(config, words)
        made = read_index(config.output)["made"] if config.add and is_store(config.output) else {}
        prepare_store(
            config.output, config.corpus, Reading(config.column, config.separator, config.quoting), tokenizer,
            held_out=made.get("held_out", config.held_out), seed=made.get("seed", config.seed), add=config.add,
            processes=config.workers or len(os.sched_getaffinity(0)), scheduler=config.scheduler,
            words=words,
        )  # fmt: skip
    train, held_out = open_stores(config.output)
    shards = len(read_index(config.output)["shards"])
    plural = "s" if shards != 1 else ""
    print(
        f"{config.output}: {shards} shard{plural}, {len(train.tokens):,} tokens in {len(train.documents) - 1:,} "
        f"documents to train on, {len(held_out.tokens):,} in {len(held_out.documents) - 1:,} held out\n"
        f"train from it with: fastbert pretrain --store {config.output} --output RUN"
    )
    return config.output


def _check(config: PrepareConfig) -> None:
    if config.output is None:
        raise ValueError("a store needs a folder: give --output")
    if config.corpus is None and not config.verify:
        raise ValueError("a store is made of a corpus: give a text file, a table with --column, or a folder of such")
    if config.workers is not None and not 1 <= config.workers <= 1024:
        raise ValueError(f"workers must be from 1 to 1024, got {config.workers}")
    if config.tokenizer is not None and config.tokenizer not in TRAINERS and not Path(config.tokenizer).is_dir():
        raise FileNotFoundError(
            f"there is no folder {config.tokenizer}: --tokenizer is a folder with a tokenizer, or one of "
            f"{', '.join(TRAINERS)} to train one"
        )
    check_fraction(config.held_out)
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {config.seed}")
    if not config.verify:
        what_is_there(config.output, config.add)


def _words(config: PrepareConfig) -> Words | None:
    if config.words is None and config.dictionary is None:
        return None
    words = Words(config.words, tuple(read_words(config.dictionary)) if config.dictionary is not None else ())
    words.check()
    return words


def _tokenizer(config: PrepareConfig, words: Words | None) -> Tokenizer:
    """The tokenizer that is given, the one that the store has, or one that is trained on the corpus."""
    begun = (config.output / PLAN).exists() or is_store(config.output)
    if config.tokenizer is not None and config.tokenizer not in TRAINERS:
        return load_tokenizer(config.tokenizer)
    if begun:
        own = is_store(config.output)
        return read_tokenizer(config.output) if own else load_tokenizer(config.output / TOKENIZER)
    documents = iter_documents(
        config.corpus, config.column, separator=config.separator, quoting=config.quoting, progress="counting words"
    )
    texts = (sentence for document in documents for sentence in document)
    train = TRAINERS[config.tokenizer or "wordpiece"]
    return train(map(words.plain, texts) if words else texts, config.vocab_size, config.lowercase, progress=True)
