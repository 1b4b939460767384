"""How a large corpus becomes a token store of shards, by one process or several, and is added to later.

A shard is a few files, or a part of one; which, depends on the corpus alone, so that the bytes of a store do not depend
on how many processes wrote it, nor on how often they were stopped. Each appears whole or not at all.
"""

import base64
import functools
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from fastbert import files
from fastbert.data import workers
from fastbert.data.corpus import Piece, Reading, piece_documents
from fastbert.data.pieces import cut, in_shards, shard_size
from fastbert.data.shards import COUNTS, FORMAT, PLAN, STORE, TOKENIZER, is_store, read_index
from fastbert.data.sources import find_files
from fastbert.data.store import META, TokenStore
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.data.words import Words
from fastbert.data.writer import (
    SIDES,
    Encode,
    Vocabulary,
    Written,
    check_fraction,
    encoder_of,
    expect_text,
    expect_words,
    write_sides,
)


def prepare_store(
    store: Path,
    corpus: Path,
    reading: Reading,
    tokenizer: Tokenizer,
    *,
    held_out: float = 0.02,
    seed: int = 0,
    add: bool = False,
    processes: int = 1,
    scheduler: str | None = None,
    nsp: bool = False,
    words: Words | None = None,
    shard_bytes: int | None = None,
    progress: bool = True,
) -> None:
    """Tokenises a corpus into the shards of a store, and goes on where an earlier call was stopped.

    Args:
        store: the folder; with `add` it holds a store, whose shards are left as they are.
        corpus, reading: see `iter_documents`.
        held_out, seed: see `write_stores`; the documents are counted in each shard for itself.
        processes: how many work at the same time on this machine; 1 works in this one.
        scheduler: address of a Dask scheduler, whose workers do it instead; they see both folders by the same path.
        nsp: refuses a store too small for next-sentence prediction.
        words: what the store shall know of words beside the vocabulary's pieces.
        shard_bytes: text in a shard; None for a 64th of the corpus, from 8 to 256 MiB.
        progress: shows a bar of bytes.

    Raises:
        FileExistsError: the store is finished, and `add` was not given. FileNotFoundError: nothing to add to.
        ValueError: another tokenizer, corpus or setting than the store was begun with; a corpus that does not hold.
            The finished store that it was to be added to stays as it was.
        OSError: the disk is full or fails; the shards that are whole stay.
    """
    check_fraction(held_out)
    store, corpus = store.resolve(), corpus.resolve()
    vocabulary = Vocabulary.of(tokenizer, words)
    before, plan = what_is_there(store, add)
    if _has_ended(before, plan):
        (store / PLAN).unlink()
        return
    expected = _conditions(corpus, reading, vocabulary, held_out, seed, shard_bytes, before)
    expected["words"] = None if words is None else [words.segmentation, list(words.dictionary)]
    if before is not None:
        _expect_same(store, before["made"], expected["made"], "was made with")
        if expected["corpus"]["digest"] in [part["digest"] for part in before["corpora"]]:
            raise ValueError(f"{store} already has the files of {corpus}, by their names and sizes: add others")
    if plan is None:
        plan = expected | {"shards": _shards(expected, reading, progress)}
        store.mkdir(parents=True, exist_ok=True)
        if before is None:
            save_tokenizer(tokenizer, store / TOKENIZER)
        _remove_shards(store, plan["first"])  # of an addition that was given up
        files.write(store, {PLAN: files.json_text(plan).encode()})
    else:
        added = f"remove {PLAN} from it, which gives up what was being added" if before else ""
        _expect_same(store, plan, expected, "was begun with", added)
    _remove_rests(store)
    counts = _write_missing(store, plan, processes, scheduler, progress)
    _remove_rests(store)
    _finish(store, plan, before, counts, vocabulary, nsp)


def what_is_there(store: Path, add: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The index of a finished store, and the plan of what an earlier call has begun; None for what is not there.

    Raises:
        FileExistsError: a finished store without `add`, or something else. FileNotFoundError: nothing to add to.
        ValueError: the index is damaged.
    """
    before = read_index(store) if is_store(store) else None
    plan = files.json_object_or_none(store / PLAN)
    if _has_ended(before, plan):
        return before, plan
    if store.exists() and not store.is_dir():
        raise FileExistsError(f"{store} is a file, and a store is a folder: choose another --output")
    if before is not None and not add:
        raise FileExistsError(f"{store} is a finished store: give --add to add to it, or choose another --output")
    if before is None and add and plan is None:
        raise FileNotFoundError(f"{store} holds no finished store to add to: leave out --add to make one")
    others = [path.name for path in store.iterdir() if path.name not in (".lock", TOKENIZER)] if store.is_dir() else []
    if before is None and plan is None and others:
        raise FileExistsError(f"{store} holds other files ({', '.join(sorted(others)[:3])}): choose another --output")
    return before, plan


def _has_ended(before: dict[str, Any] | None, plan: dict[str, Any] | None) -> bool:
    """Whether the call before has written all, and was stopped as it was about to remove its plan."""
    return before is not None and plan is not None and len(before["shards"]) > plan["first"]


# ---- before anything is written --------------------------------------------------------------------------------------


def _conditions(
    corpus: Path, reading: Reading, vocabulary: Vocabulary, held_out: float, seed: int, shard_bytes: int | None,
    before: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """What the shards are made of and with, as JSON has it."""
    read = find_files(corpus, reading.column, reading.separator).read
    stats = [file.stat() for file in read]
    named = [(str(file.relative_to(corpus) if file != corpus else file.name)) for file in read]
    sizes = [stat.st_size for stat in stats]
    digest = hashlib.sha256(json.dumps([named, sizes, reading]).encode()).hexdigest()
    return {
        "made": {
            "tokenizer": vocabulary.fingerprint, "vocab_size": vocabulary.size, "words": vocabulary.words,
            "held_out": held_out, "seed": seed,
        },
        "special": vocabulary.special,
        "reading": list(reading),
        "corpus": {"files": len(read), "bytes": sum(sizes), "digest": digest},
        "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(read, stats, strict=True)],
        "shard_bytes": shard_bytes or shard_size(sum(sizes)),
        "first": len(before["shards"]) if before else 0,
    }  # fmt: skip


def _expect_same(store: Path, then: dict[str, Any], now: dict[str, Any], how: str, instead: str = "") -> None:
    then = json.loads(files.json_text(then))
    now = json.loads(files.json_text(now))
    different = []
    for name, value in now.items():
        if then.get(name) == value:
            continue
        if isinstance(value, dict):
            parts = [f"{part} {_brief(then.get(name, {}).get(part))}, now {_brief(x)}" for part, x in value.items()
                     if then.get(name, {}).get(part) != x]  # fmt: skip
            different += parts
        else:
            different.append(f"other {name}" if isinstance(value, list) else f"{name} {then.get(name)}, now {value}")
    if different:
        raise ValueError(
            f"{store} {how} another tokenizer, corpus or setting ({'; '.join(different)}): give the same as before, "
            f"or {instead or 'choose another --output'}"
        )


def _brief(value: Any) -> Any:
    """A fingerprint by its beginning, which tells it from another as well."""
    return value[:12] if isinstance(value, str) else value


def _shards(expected: dict[str, Any], reading: Reading, progress: bool) -> list[Any]:
    """Of each shard the pieces: number of the file, start, end, weight."""
    size = expected["shard_bytes"]
    pieces = []
    with tqdm(total=expected["corpus"]["bytes"], desc="looking at files", unit="B", unit_scale=True,
              disable=not progress, leave=False) as bar:  # fmt: skip
        for number, (file, held, _) in enumerate(expected["files"]):
            pieces += [piece._replace(file=number) for piece in cut(Path(file), reading, size)]
            bar.update(held)
    return [[list(piece) for piece in shard] for shard in in_shards(pieces, size)]


def _remove_rests(store: Path) -> None:
    """Removes what processes that were killed had not finished."""
    for rest in store.glob(".*.writing"):
        shutil.rmtree(rest, ignore_errors=True)


def _remove_shards(store: Path, first: int) -> None:
    """Removes shards from number `first` on, of which no plan and no index knows."""
    for meta in store.glob(f"*/{SIDES[0]}/{META}"):
        shard = meta.parent.parent
        if shard.name.isdecimal() and int(shard.name) >= first:
            shutil.rmtree(shard)


# ---- the shards ------------------------------------------------------------------------------------------------------


def write_shard(store: str | Path, number: int, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Writes a shard of the store's plan, whole or not at all; what any process does that works on it.

    Args:
        progress: is told how many bytes of text were read since it was told last.

    Returns:
        Its number, and its `counts`, see `_packed`.
    """
    store = Path(store)
    plan, encoder, vocabulary = _tools(store, (store / PLAN).read_bytes())
    target = store / f"{number:05d}"
    writing = store / f".{target.name}.{uuid.uuid4().hex}.writing"
    writing.mkdir()
    try:
        documents = _documents(plan, plan["shards"][number - plan["first"]], progress or (lambda read: None))
        with closing(documents):
            made = plan["made"]
            sides = write_sides(writing, documents, encoder, vocabulary, made["held_out"], made["seed"], number)
        files.flush_all(writing)
        try:
            writing.rename(target)
        except OSError:
            if not target.is_dir():  # where another process wrote the same in the meantime, that is as good
                raise
            shutil.rmtree(writing)
        files.flush(store)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return {"number": number, "counts": _packed(np.stack([side.counts for side in sides]))}


@functools.lru_cache(1)
def _tools(store: Path, plan: bytes) -> tuple[dict[str, Any], Encode, Vocabulary]:
    plan = json.loads(plan)
    made, listed = plan["made"], plan["words"]
    words = None if listed is None else Words(listed[0], tuple(listed[1]))
    tokenizer = load_tokenizer(store / TOKENIZER)
    vocabulary = Vocabulary.of(tokenizer, words)
    if vocabulary.fingerprint != made["tokenizer"]:
        raise ValueError(f"{store / TOKENIZER} is another tokenizer than the store was begun with: put it back")
    return plan, encoder_of(tokenizer, words), vocabulary


def _documents(plan: dict[str, Any], pieces: list[Any], progress: Callable[[int], None]) -> Iterator[list[str]]:
    reading = Reading(*plan["reading"])
    for number, start, end, weight in pieces:
        file, size, changed = plan["files"][number]
        stat = os.stat(file)
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            raise ValueError(
                f"{file} was changed while the store was being written: delete the store and prepare it again"
            )
        told = 0

        def read(place: int) -> None:
            nonlocal told
            if place - told >= 1 << 20:
                progress(place - told)
                told = place

        yield from piece_documents(Piece(Path(file), start, end), reading, read)
        progress(weight - told)


def _packed(counts: np.ndarray) -> str:
    """int64 [2, V] as text; most of a shard's counts are small."""
    return base64.b64encode(zlib.compress(counts.tobytes(), 1)).decode()


def _write_missing(
    store: Path, plan: dict[str, Any], processes: int, scheduler: str | None, progress: bool
) -> np.ndarray:
    """Writes the shards that are not there; how often each id occurs in all of the plan's, int64 [2, V]."""
    counts = np.zeros((2, plan["made"]["vocab_size"]), np.int64)
    missing, weights = [], {}
    total = 0
    for number, pieces in enumerate(plan["shards"], plan["first"]):
        weights[number] = sum(piece[-1] for piece in pieces)
        total += weights[number]
        folder = store / f"{number:05d}"
        if folder.is_dir():
            counts += [TokenStore.open(folder / side).token_counts() for side in SIDES]
        else:
            missing.append(number)
    done = total - sum(weights[number] for number in missing)
    bar = tqdm(total=total, initial=done, desc="tokenising", unit="B", unit_scale=True, disable=not progress)
    with bar:
        if scheduler is not None:
            results = workers.on_cluster(scheduler, write_shard, store, missing, lambda n: bar.update(weights[n]))
        elif min(processes, len(missing)) <= 1:
            results = (write_shard(store, number, bar.update) for number in missing)
        else:
            results = workers.on_this_machine(store, missing, processes, bar.update)
        for result in results:
            own = np.frombuffer(zlib.decompress(base64.b64decode(result["counts"])), np.int64)
            counts += own.reshape(counts.shape)
    return counts


def _finish(
    store: Path, plan: dict[str, Any], before: dict[str, Any] | None, counts: np.ndarray, vocabulary: Vocabulary,
    nsp: bool,
) -> None:  # fmt: skip
    names = [f"{number:05d}" for number in range(plan["first"], plan["first"] + len(plan["shards"]))]
    opened = [[TokenStore.open(store / name / side, verify=False) for side in SIDES] for name in names]
    sides = [
        Written(side, *(sum(len(x) - less for x in arrays) for arrays, less in
                        (([s.tokens for s in stores], 0), ([s.sentences for s in stores], 1),
                         ([s.documents for s in stores], 1))), each)
        for side, stores, each in zip(SIDES, zip(*opened, strict=True), counts, strict=True)
    ]  # fmt: skip
    if before is None:
        expect_text(sides, vocabulary, nsp)
    else:
        tokens, sentences, documents = (sum(each) for each in zip(*(side[1:4] for side in sides), strict=True))
        try:
            expect_words(Written("this addition", tokens, sentences, documents, counts.sum(0)), vocabulary)
        except ValueError:
            (store / PLAN).unlink()
            _remove_shards(store, plan["first"])
            raise
        counts = counts + np.fromfile(store / COUNTS, np.int64).reshape(counts.shape)
    new = [[name, *(side.fingerprint for side in each)] for name, each in zip(names, opened, strict=True)]
    index = {
        "format": FORMAT,
        "made": plan["made"],
        "shards": (before["shards"] if before else []) + new,
        "corpora": [*(before["corpora"] if before else []), plan["corpus"] | {"shards": len(new)}],
        "counts": zlib.crc32(counts),
    }
    files.write(store, {COUNTS: counts.tobytes(), STORE: (files.json_text(index, indent=1) + "\n").encode()})
    (store / PLAN).unlink()
