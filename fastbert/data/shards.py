"""A token store of many shards, as it is read; `fastbert.data.shard_writer` writes it.

store.json            the shards, and what they were made with; written last, so that it is there when all is
tokenizer/            the tokenizer whose ids they hold
counts.bin            int64 [2, V], how often each id occurs in what is trained on, and in what is held out
00000/ 00001/ ...     the shards, each with train/ and held_out/ as of `fastbert.data.store`
unfinished.json       while shards are written: which part of which file each is made of
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert import files
from fastbert.data.store import REWRITE, TokenStore
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.writer import SIDES, Vocabulary

FORMAT = 2
STORE, PLAN, COUNTS, TOKENIZER = "store.json", "unfinished.json", "counts.bin", "tokenizer"


def is_store(folder: Path) -> bool:
    """Whether `folder` holds a finished store of shards."""
    return (folder / STORE).is_file()


def open_stores(folder: Path, shards: int | None = None, verify: bool = False) -> tuple[TokenStore, TokenStore]:
    """What is trained on and what is held out of a store of shards, or of a run's `data` of an earlier version.

    Args:
        shards: the first so many; None for all.
        verify: reads all files and compares their checksums; their sizes are compared in any case.

    Raises:
        FileNotFoundError: no store, or none that is finished. ValueError: a shard is missing, cut short or changed.
    """
    if (folder / SIDES[0] / "meta.json").is_file():
        train, held_out = (TokenStore.open(folder / side, verify) for side in SIDES)
        return train, held_out
    index = read_index(folder)
    counts = np.fromfile(folder / COUNTS, np.int64) if (folder / COUNTS).is_file() else np.empty(0, np.int64)
    sides: list[list[TokenStore]] = [[], []]
    try:
        if zlib.crc32(counts) != index["counts"]:
            raise ValueError(f"{folder / COUNTS} is missing or damaged")
        for name, *prints in index["shards"][:shards]:
            for side, stores, expected in zip(SIDES, sides, prints, strict=True):
                stores.append(TokenStore.open(folder / name / side, verify))
                if stores[-1].fingerprint != expected:
                    raise ValueError(
                        f"{folder / name / side} is another shard than the store was written with: {REWRITE}"
                    )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not as it was written: {error}") from error
    per_side = counts.reshape(2, -1) if shards in (None, len(index["shards"])) else (None, None)
    train, held_out = (
        TokenStore.join(folder / side, stores, (_open_side, (folder, number, shards)), each)
        for number, (side, stores, each) in enumerate(zip(SIDES, sides, per_side, strict=True))
    )
    return train, held_out


def _open_side(folder: Path, number: int, shards: int | None) -> TokenStore:
    return open_stores(folder, shards)[number]


def read_index(folder: Path) -> dict[str, Any]:
    """What `store.json` says; FileNotFoundError where there is none, ValueError where it is damaged."""
    if not is_store(folder):
        raise FileNotFoundError(
            f"{folder} is not finished: run the same fastbert prepare once more, and it goes on where it was stopped"
            if (folder / PLAN).is_file()
            else f"{folder} holds no token store ({STORE} is missing): write one with fastbert prepare"
        )
    index = files.json_object_or_none(folder / STORE)
    if index is None or not {"format", "made", "shards", "corpora", "counts"} <= index.keys():
        raise ValueError(f"{folder / STORE} is damaged: delete the folder and prepare the store again")
    if index["format"] != FORMAT:
        raise ValueError(
            f"{folder / STORE} says format {index['format']}, this version reads format {FORMAT}: prepare it again"
        )
    return index


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a store; ValueError where it is another than the shards were written with."""
    made = read_index(folder)["made"]
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if Vocabulary.of(tokenizer).fingerprint != made["tokenizer"]:
        raise ValueError(
            f"{folder / TOKENIZER} is another tokenizer than the store was written with: put it back as it was"
        )
    return tokenizer
