"""What a run trains on: a tokenizer and two token stores, made once from the corpus and known by what they are made of.

`corpus.json` in the run's folder says what that is. It is written before them, and each of them appears whole or not at
all; so what stands there belongs to it, and a second try makes only what is missing or has other settings.
"""

import contextlib
import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastbert import files
from fastbert.data.byte_bpe import train_byte_bpe
from fastbert.data.corpus import Reading, iter_documents
from fastbert.data.dictionary import say_what_is_not_found
from fastbert.data.shard_writer import prepare_store
from fastbert.data.shards import PLAN, open_stores, read_index, read_tokenizer
from fastbert.data.sources import find_files
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, special_ids, train_tokenizer
from fastbert.data.unigram import train_unigram
from fastbert.data.words import Words
from fastbert.ops.philox import CONTRACT
from fastbert.pretrain.environment import RANDOM_NUMBERS, contract_of
from fastbert.pretrain.init import COPY, extended_tokenizer
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.words import keep_dictionary, words_of
from fastbert.version import __version__

MADE_OF = "corpus.json"
# Marks that stand for vowels, from Devanagari to Vedic; accents of Latin and Greek letters are not among them.
VOWEL_SIGNS = re.compile(f"[{''.join(c for c in map(chr, range(0x900, 0x1D00)) if unicodedata.category(c) == 'Mn')}]")
MANY_SIGNS = 0.001  # share of the characters from which that warning is worth its line
MANY_UNKNOWN = 0.1  # share of [UNK] from which a warning is worth its line


def prepare(config: PretrainConfig, resume: bool) -> tuple[Tokenizer, TokenStore, TokenStore]:
    """Tokenizer, training and held-out store of the run in `config.output`, made where they are missing.

    A new run reuses what an earlier try made of the same corpus with the same settings, and replaces the rest. A
    resumed run reads the corpus only where something is missing.

    Raises:
        FileNotFoundError: no corpus.
        ValueError: a corpus that does not hold; a corpus that is no longer what a resumed run began with; a tokenizer
            or a store that no run made, is damaged, or does not belong to the other.
    """
    if config.store is not None:
        return _from_store(config, resume)
    tokenizer_at, data_at = config.output / "tokenizer", config.output / "data"
    words = words_of(config, resume)
    if resume and not ((tokenizer_at / "tokenizer.json").exists() and _finished(data_at)):
        _expect_same_corpus(config, words)
    if not resume:
        keep_dictionary(config)
        _discard_what_differs(config, words, tokenizer_at, data_at)
    if not (tokenizer_at / "tokenizer.json").exists() and config.init is not None:
        save_tokenizer(extended_tokenizer(config), tokenizer_at)
    elif not (tokenizer_at / "tokenizer.json").exists():
        texts = (sentence for document in _documents(config, "counting words") for sentence in document)
        if words is not None:
            texts = map(words.plain, texts)
        if config.lowercase:
            texts = _vowel_signs_said(texts)
        train = {"wordpiece": train_tokenizer, "unigram": train_unigram, "bpe": train_byte_bpe}[config.tokenizer]
        save_tokenizer(train(texts, config.vocab_size, config.lowercase, progress=True), tokenizer_at)
    with _usable(tokenizer_at):
        tokenizer = load_tokenizer(tokenizer_at)
    if words is not None and not resume and (line := say_what_is_not_found(words.dictionary, tokenizer)):
        print(line)
    made = not _finished(data_at)
    if made:
        prepare_store(
            data_at, config.corpus, Reading(**_reading(config)), tokenizer, held_out=config.held_out, seed=config.seed,
            processes=len(os.sched_getaffinity(0)), nsp=config.objective == "mlm+nsp", words=words,
        )  # fmt: skip
    with _usable(data_at):
        stores = open_stores(data_at, verify=True)
        for store in stores:
            store.check_tokenizer(tokenizer)
            store.check_words(words)
    if made:
        _say_unknown(tokenizer, stores)
    return tokenizer, *stores


def _finished(data_at: Path) -> bool:
    """Whether the run's data is there, and if only in part: nothing of it is to be made before that is looked at."""
    return data_at.exists() and not (data_at / PLAN).exists()


def _from_store(config: PretrainConfig, resume: bool) -> tuple[Tokenizer, TokenStore, TokenStore]:
    """Tokenizer and stores of `config.store`; a resumed run has the shards that it began with."""
    made = (files.json_object_or_none(config.output / MADE_OF) or {}) if resume else {}
    stores = open_stores(config.store, made.get("shards"))
    tokenizer = read_tokenizer(config.store) if config.init is None else extended_tokenizer(config)
    for store in stores:
        store.check_tokenizer(tokenizer)
    least = min(len(store.documents) - 1 for store in stores)
    if config.objective == "mlm+nsp" and least < 2:
        raise ValueError(
            f"next-sentence prediction needs two documents to train on and two held out, and {config.store} has "
            f"{least} on one side: train without it (--objective mlm+sop or mlm), or prepare a store of more"
        )
    if not resume:
        save_tokenizer(tokenizer, config.output / "tokenizer")
        made = {"fastbert": __version__, "store": config.store.resolve()}
        made["shards"] = len(read_index(config.store)["shards"])
        files.write(config.output, {MADE_OF: files.json_text(made, indent=2).encode()})
    return tokenizer, *stores


def fingerprints(tokenizer: Tokenizer, train: TokenStore, held_out: TokenStore) -> dict[str, str]:
    """What a snapshot was trained on, for `check_fingerprints`."""
    return {
        "tokenizer": fingerprint(tokenizer),
        "training text": train.fingerprint,
        "held-out text": held_out.fingerprint,
    }


def check_fingerprints(then: dict[str, str], now: dict[str, str], folder: Path) -> None:
    """Raises ValueError where the run's folder holds another tokenizer or text than its snapshot was trained on."""
    different = [name for name, value in now.items() if then.get(name) != value]
    if different:
        raise ValueError(
            f"the newest snapshot in {folder} was trained with another {' and another '.join(different)} than the "
            "folder holds now: put back its tokenizer/ and data/ as they were, or start a new run in another --output"
        )


def made_of(config: PretrainConfig, words: Words | None) -> dict[str, Any]:
    """What tokenizer and stores depend on: the corpus by its content, and the settings that shape them."""
    path = config.corpus
    digest, size = hashlib.sha256(), 0
    read = find_files(path, config.column, config.separator).read
    for file in read:
        with files.naming(file), file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
            size += stream.tell()
        digest.update(os.fsencode(file.relative_to(path) if path.is_dir() else file.name) + b"\0" + content)
    corpus = {"files": len(read), "bytes": size, "sha256": digest.hexdigest()}
    tokenizer = {"kind": config.tokenizer, "vocab_size": config.vocab_size, "lowercase": config.lowercase}
    if config.init is not None:
        tokenizer = {"init": fingerprint(extended_tokenizer(config))}
    data = {"held_out": config.held_out, "seed": config.seed, RANDOM_NUMBERS: CONTRACT}
    if words is not None:
        data["words"] = words.meta()
        if words.segmentation == "spaces":
            tokenizer["words"] = "spaces"  # the vocabulary is made of the text without them
    return {
        "fastbert": __version__,
        "corpus": corpus,
        "reading": _reading(config),
        "tokenizer": tokenizer,
        "data": data,
    }


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """What is wrong with the content of `folder` within the block is raised with what to do about it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} cannot be used: {error}. Remove it as a whole, and it is made again of the corpus, if that is "
            "unchanged"
        ) from error


def _reading(config: PretrainConfig) -> dict[str, Any]:
    return {"column": config.column, "separator": config.separator, "quoting": config.quoting}


def _documents(config: PretrainConfig, progress: str) -> Iterator[list[str]]:
    return iter_documents(config.corpus, **_reading(config), progress=progress)


def _vowel_signs_said(texts: Iterator[str]) -> Iterator[str]:
    """The same texts; behind the last one a warning, where lower-casing takes the vowels out of a script's words."""
    characters = signs = 0
    for text in texts:
        characters += len(text)
        signs += len(VOWEL_SIGNS.findall(text))
        yield text
    if signs > MANY_SIGNS * characters:
        print(
            f"warning: the text has {signs:,} vowel signs, as of Thai or Hindi. Lower-casing strips them with all "
            "other marks, as uncased BERT does, and makes one word of several: pass --no-lowercase"
        )


def _say_unknown(tokenizer: Tokenizer, stores: tuple[TokenStore, ...]) -> None:
    counts = sum(store.token_counts() for store in stores)
    share = counts[special_ids(tokenizer).unk] / counts.sum()
    print(f"[UNK]: {share:.1%} of {counts.sum():,} tokens")
    if share > MANY_UNKNOWN:
        print(
            "warning: the vocabulary does not know so much of the text, and [UNK] is never predicted: look at the text "
            "for what is no language, take a larger --vocab-size, or put spaces between the words of a language that "
            "is written without"
        )


def _discard_what_differs(config: PretrainConfig, words: Words | None, tokenizer_at: Path, data_at: Path) -> None:
    now, then = made_of(config, words), files.json_object_or_none(config.output / MADE_OF)
    copied = [] if config.init is None else [config.output / COPY]
    if then is None and (found := [str(path) for path in (tokenizer_at, data_at, *copied) if path.exists()]):
        raise ValueError(
            f"{' and '.join(found)} would be the new run's, and {MADE_OF} beside it does not say that a run made it: "
            "remove it, or choose another --output"
        )
    then = then or now
    same_tokenizer = all(then.get(part) == now[part] for part in ("fastbert", "corpus", "reading", "tokenizer"))
    if not same_tokenizer:
        shutil.rmtree(tokenizer_at, ignore_errors=True)
    if not same_tokenizer or then.get("data") != now["data"]:
        shutil.rmtree(data_at, ignore_errors=True)
    files.write(config.output, {MADE_OF: files.json_text(now, indent=2).encode()})


def _expect_same_corpus(config: PretrainConfig, words: Words | None) -> None:
    now, then = made_of(config, words), files.json_object_or_none(config.output / MADE_OF)
    if then is None or then.get("corpus") != now["corpus"]:
        gone = f"{config.output} lacks its tokenizer/ or data/"
        before = f"no readable {MADE_OF} says what it was made of" if then is None else f"was {then.get('corpus')}"
        raise ValueError(
            f"{gone}, and the corpus {config.corpus} is not known to be the one that the run began with ({before}, is "
            f"{now['corpus']}): put either back as it was, or start a new run in another --output"
        )
    before = contract_of(then.get("data"))
    if before != CONTRACT and not (config.output / "data").exists():
        raise ValueError(
            f"{config.output} lacks its data/, whose held-out documents were drawn by contract {before} of random "
            f"numbers: this version draws others, by contract {CONTRACT}. Put it back as it was, or start a new run in "
            "another --output"
        )
