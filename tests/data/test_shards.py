"""Stores of many shards: the same bytes however they come about, nothing lost, nothing overwritten."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data import (
    PretrainBatches,
    Reading,
    TokenStore,
    iter_documents,
    load_tokenizer,
    open_stores,
    prepare_store,
    save_tokenizer,
    shards,
    special_ids,
    train_tokenizer,
)
from fastbert.data.corpus import piece_documents
from fastbert.data.pieces import cut, in_shards
from fastbert.data.shards import PLAN, STORE, read_index, read_tokenizer
from fastbert.data.store import Joined
from fastbert.data.wordwise import Encoder
from fastbert.data.writer import Vocabulary, write_sides

TEXTS = [text for _, text in sorted(topics.items())][:60]
SHARD = 24_000  # bytes of text, which makes nine of them


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:20]))
    (folder / "b.txt").write_text("\n\n".join(TEXTS[20:]))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 512)


@pytest.fixture(scope="module")
def store(tmp_path_factory, corpus, tokenizer):
    """Written by this process alone."""
    folder = tmp_path_factory.mktemp("prepared") / "store"
    prepare_store(folder, corpus, Reading(), tokenizer, held_out=0.1, shard_bytes=SHARD, progress=False)
    return folder


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def again(folder, corpus, tokenizer, **options):
    options = {"held_out": 0.1, "shard_bytes": SHARD, "progress": False} | options
    prepare_store(folder, corpus, Reading(), tokenizer, **options)


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_all_text_is_there_in_order_and_the_ids_are_the_tokenizer_s(store, corpus, tokenizer):
    """A shard's documents, those held out among them, are a run of the corpus's."""
    documents = [
        [ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False) if (ids := e.ids)]
        for sentences in iter_documents(corpus)
    ]
    assert len(read_index(store)["shards"]) == 9 and sorted(content(store))[:2] == [
        "00000/held_out/documents.bin", "00000/held_out/meta.json",
    ]  # fmt: skip
    held_out = 0
    for name, *_ in read_index(store)["shards"]:
        sides = [TokenStore.open(store / name / side) for side in ("train", "held_out")]
        written = [[[s.tolist() for s in side.document(i)] for i in range(len(side.documents) - 1)] for side in sides]
        held_out += len(written[1])
        while written[0] or written[1]:
            expected = documents.pop(0)
            side = next((side for side in written if side and side[0] == expected), None)
            if side is None:  # the end of a shard of few documents, part of which is held out
                rest = [sentence for left in written for document in left for sentence in document]
                flat = [i for sentence in rest for i in sentence]
                while len([i for s in expected for i in s]) < len(flat):
                    expected += documents.pop(0)
                assert flat == [i for sentence in expected for i in sentence]
                break
            side.pop(0)
    assert not documents and held_out >= 9


def test_many_shards_are_read_as_one_store(store):
    """Batches of every kind are those of the same arrays in one piece."""
    tokenizer = read_tokenizer(store)
    for joined in open_stores(store, verify=True):
        parts = list(joined.shards())
        assert len(parts) == 9
        sentences = np.append(0, np.concatenate([first + own[1:] for first, own, _ in parts]))
        documents = np.append(0, np.concatenate([
            joined.sentences.searchsorted(first) + own[1:] for first, _, own in parts
        ]))  # fmt: skip
        whole = TokenStore(joined.folder, joined.tokens[:], sentences, documents, joined.vocab_size, joined.tokenizer)
        assert np.array_equal(joined.token_counts(), whole.token_counts())
        assert [x.tolist() for x in joined.document(3)] == [x.tolist() for x in whole.document(3)]
        for options in ({"objective": "mlm+nsp"}, {"objective": "mlm+sop", "static": True}, {"objective": "mlm"}):
            ours, theirs = (
                PretrainBatches(each, special_ids(tokenizer), seq_len=64, batch_tokens=256, seed=3, **options)
                for each in (joined, whole)
            )
            assert len(ours) == len(theirs) > 2
            for a, b in zip(
                map(ours.__getitem__, ours.numbers()), map(theirs.__getitem__, theirs.numbers()), strict=True
            ):
                assert a.input_ids.tolist() == b.input_ids.tolist() and a.labels.tolist() == b.labels.tolist()


offsets = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda lengths: np.cumsum([0, *lengths]))


@settings(max_examples=200, deadline=None)
@given(st.lists(offsets, min_size=1, max_size=5), st.data())
def test_joined_arrays_are_one(parts, data):
    joined, base, whole = Joined(parts, offsets=True), 0, [0]
    for part in parts:
        whole += (base + part[1:]).tolist()
        base = whole[-1]
    whole = np.array(whole)
    places = np.array(data.draw(st.lists(st.integers(-len(whole), len(whole) - 1), max_size=9)), np.int64)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    values = np.array(data.draw(st.lists(st.integers(0, int(whole[-1]) + 1), min_size=1, max_size=9)))
    assert len(joined) == len(whole) and joined[-1] == whole[-1]
    assert np.array_equal(joined[places], whole[places]) and np.array_equal(joined[first:last], whole[first:last])
    for side in ("left", "right"):
        assert np.array_equal(joined.searchsorted(values, side), whole.searchsorted(values, side))
    tokens = Joined([part.astype(np.uint16) for part in parts])
    for wrong in (len(whole), [-len(whole) - 1], whole > 0, slice(None, None, 2)):
        with pytest.raises(IndexError):
            joined[wrong]
    assert np.array_equal(tokens[:], np.concatenate(parts)) and tokens[[0, -1]].dtype == np.uint16


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 7])
def test_the_bytes_do_not_depend_on_how_many_write_them(store, corpus, tokenizer, tmp_path, processes):
    again(tmp_path / "store", corpus, tokenizer, processes=processes)
    assert content(tmp_path / "store") == content(store)


WRITE = """
import os, signal, sys, time
from pathlib import Path
from fastbert.data import Reading, load_tokenizer, prepare_store, workers
store, corpus, tokenizer, shard, shards, seconds = sys.argv[1:]
in_processes = workers.on_this_machine

def killed(*arguments):
    for number, result in enumerate(in_processes(*arguments)):
        if number == int(shards):
            time.sleep(float(seconds))
            os.kill(os.getpid(), signal.SIGKILL)
        yield result

workers.on_this_machine = killed
prepare_store(Path(store), Path(corpus), Reading(), load_tokenizer(tokenizer), held_out=0.1, shard_bytes=int(shard),
              processes=2, progress=False)
"""


def killed_and_resumed(store, corpus, folder, kills, shard, seed):
    """How often the process that writes a store was killed, at random moments while its two processes were writing."""
    chance = random.Random(seed)
    for killed in range(kills + 1):
        moment = (chance.randrange(3), chance.uniform(0, 0.02)) if killed < kills else (-1, 0)
        command = [sys.executable, "-c", WRITE, folder, corpus, store / "tokenizer", str(shard), *map(str, moment)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            return killed
        assert status == -signal.SIGKILL
    raise AssertionError("it did not end")


def test_killed_and_resumed_it_has_the_same_bytes(store, corpus, tmp_path):
    assert killed_and_resumed(store, corpus, tmp_path / "store", 1, SHARD, seed=0) == 1
    assert content(tmp_path / "store") == content(store)


@pytest.mark.nested
def test_killed_ten_times_it_has_the_same_bytes(store, corpus, tokenizer, tmp_path):
    again(tmp_path / "once", corpus, tokenizer, shard_bytes=4_000)
    assert len(read_index(tmp_path / "once")["shards"]) > 30
    assert killed_and_resumed(store, corpus, tmp_path / "store", 10, 4_000, seed=1) >= 5
    assert content(tmp_path / "store") == content(tmp_path / "once")


@pytest.mark.nested
def test_a_cluster_of_which_a_worker_is_killed_writes_the_same_bytes(corpus, tokenizer, tmp_path):
    """Two Dask workers as processes of their own; one is killed when the first shard is there."""
    pytest.importorskip("distributed")
    again(tmp_path / "once", corpus, tokenizer, shard_bytes=4_000)
    dask = (
        [sys.executable, "-m", "distributed.cli.dask_scheduler"],
        [sys.executable, "-m", "distributed.cli.dask_worker"],
    )
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*dask[0], "--scheduler-file", file, "--port", "0", "--no-dashboard"], **quiet)]
    try:
        while not file.exists():
            assert running[0].poll() is None
            time.sleep(0.1)
        for _ in range(2):
            options = "--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", tmp_path / "dask"
            running.append(subprocess.Popen([*dask[1], "--scheduler-file", file, *options], **quiet))
        address = json.loads(file.read_text())["address"]
        program = WRITE.replace("processes=2", f"scheduler={address!r}")
        arguments = tmp_path / "store", corpus, tmp_path / "once/tokenizer", "4000", "-1", "0"
        writing = subprocess.Popen([sys.executable, "-c", program, *arguments])
        while not list((tmp_path / "store").glob("0*")):
            assert writing.poll() is None
            time.sleep(0.01)
        running[1].kill()
        missing = len(read_index(tmp_path / "once")["shards"]) - len(list((tmp_path / "store").glob("0*")))
        assert writing.wait(120) == 0 and missing > 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert content(tmp_path / "store") == content(tmp_path / "once")


# ---- what a corpus may be --------------------------------------------------------------------------------------------


def write_table(folder, texts):
    (folder / "t.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    quoted = "".join('"{}",1\r\n'.format(text.replace('"', '""')) for text in texts)
    (folder / "t.csv").write_text("\ufefftext,id\r\n" + quoted, newline="")
    (folder / "t.tsv").write_text("id\ttext\n" + "".join(f"1\t{text.replace(chr(10), '<br>')}\n" for text in texts))


def halves(file):
    """A compressed file may be several in a row, which need not end where a line does."""
    data = file.read_bytes()
    return data[: len(data) // 2], data[len(data) // 2 :]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.jsonl.gz", "t.csv.zst", "t.parquet", "t.txt.gz"])
def test_a_file_in_pieces_is_the_file(tmp_path, name):
    """Compressed or not, whatever the size of the pieces; those after the first begin in the middle of the file."""
    texts = [text.strip().replace("\t", " ") for text in TEXTS[:12]] + ['"Köln", said he.\nUnd 中文。 So!'] * 40
    write_table(tmp_path, texts)
    (tmp_path / "t.txt").write_text("\n \n".join(texts))
    kind = name.split(".")[1]
    file, plain = tmp_path / name, tmp_path / f"t.{kind}"
    if kind == "parquet":
        table, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [*texts, None, ""]
        parquet.write_table(table.table({"id": range(len(rows)), "text": rows}), file, row_group_size=3)
        plain = tmp_path / "t.jsonl"
    elif name.endswith(".gz"):
        file.write_bytes(b"".join(map(gzip.compress, halves(plain))))
    elif name.endswith(".zst"):
        file.write_bytes(b"".join(map(pytest.importorskip("zstandard").compress, halves(plain))))
    column = None if kind == "txt" else "text"
    expected = list(iter_documents(plain, column))
    assert len(expected) >= len(texts) and list(iter_documents(file, column)) == expected
    for size in (500, 5_000, 10**7):
        pieces = cut(file, Reading(column), size)
        assert kind == "parquet" or len(pieces) <= pieces[-1].end // size + 1
        shards = in_shards(pieces, size)
        assert [d for pieces in shards for piece in pieces for d in piece_documents(piece, Reading(column))] == expected
        assert len(shards) > {500: 3, 5_000: 1, 10**7: 0}[size]
        assert [piece.start for pieces in shards for piece in pieces][1:] == [
            piece.end for pieces in shards for piece in pieces
        ][:-1]


def test_an_error_behind_the_first_piece_names_the_line_of_the_file(tmp_path):
    write_table(tmp_path, ["One\nline."] * 50 + ["bad"] + ["More."] * 50)
    file = tmp_path / "t.jsonl"
    file.write_text(file.read_text().replace('"bad"', "7"))
    pieces = cut(file, Reading("text"), 300)
    with pytest.raises(ValueError, match=r"t\.jsonl, line 51: the field 'text' must be a string"):
        [list(piece_documents(piece, Reading("text"))) for piece in pieces]
    file = tmp_path / "t.csv"
    file.write_bytes(file.read_bytes().replace(b'"bad",1', b'"bad",1,2'))
    with pytest.raises(ValueError, match=r"t\.csv, line 102: the row has 3 cells"):
        [list(piece_documents(piece, Reading("text"))) for piece in cut(file, Reading("text"), 300)]


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst"])
def test_a_compressed_file_that_was_cut_off_is_named(tmp_path, name):
    data = ("A sentence. " * 2000).encode()
    compress = gzip.compress if name.endswith("gz") else pytest.importorskip("zstandard").compress
    (tmp_path / name).write_bytes(compress(data)[:-6])
    with pytest.raises(ValueError, match=rf"{name} is damaged or was cut off .*: fetch or write it again"):
        list(iter_documents(tmp_path / name))


# ---- adding, and what is refused -------------------------------------------------------------------------------------


def test_shards_are_added_and_the_others_stay(store, corpus, tokenizer, tmp_path):
    folder, more = tmp_path / "store", tmp_path / "more.txt"
    shutil.copytree(store, folder)
    more.write_text("\n\n".join(f"the statement {i} is here. it goes on." for i in range(60)))
    again(folder, more, tokenizer, add=True, shard_bytes=1_000)
    before, after = content(store), content(folder)
    kept = {name: data for name, data in after.items() if name in before}
    assert {name for name in kept if kept[name] != before[name]} == {STORE, "counts.bin"}
    train, held_out = open_stores(folder, verify=True)
    assert open_stores(folder, shards=9)[0].fingerprint == open_stores(store)[0].fingerprint != train.fingerprint
    assert len(read_index(folder)["shards"]) > 10 and not (folder / PLAN).exists()
    for side in (train, held_out):
        assert np.array_equal(side.token_counts(), np.bincount(side.tokens[:], minlength=512))
    assert len(train.documents) + len(held_out.documents) - sum(len(s.documents) for s in open_stores(store)) == 60
    with pytest.raises(ValueError, match="already has the files"):
        again(folder, more, tokenizer, add=True, shard_bytes=1_000)


def test_an_addition_that_fails_is_given_up_and_the_store_stays(store, tokenizer, tmp_path):
    folder, more = tmp_path / "store", tmp_path / "more.txt"
    shutil.copytree(store, folder)
    more.write_bytes(b"it goes on.\n\n" * 300 + b"\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        again(folder, more, tokenizer, add=True, shard_bytes=1_000)
    assert (folder / "00009").is_dir()
    more.write_bytes(b"it is here.\n\n" * 300)
    with pytest.raises(ValueError, match=r"was begun with another .*other files.*, or remove unfinished\.json from it"):
        again(folder, more, tokenizer, add=True, shard_bytes=1_000)
    assert open_stores(folder, verify=True)[0].fingerprint == open_stores(store)[0].fingerprint
    (folder / PLAN).unlink()
    again(folder, more, tokenizer, add=True, shard_bytes=1_000)
    shutil.copytree(store, tmp_path / "at once")
    again(tmp_path / "at once", more, tokenizer, add=True, shard_bytes=1_000)
    before = content(folder)
    assert content(tmp_path / "at once") == before

    more.write_text("\u5b57\n\n" * 40)
    with pytest.raises(ValueError, match=r"all .* tokens of the documents for this addition are \[UNK\]"):
        again(folder, more, tokenizer, add=True)
    assert content(folder) == before


def test_what_is_there_is_never_written_over(store, corpus, tokenizer, tmp_path):
    with pytest.raises(FileExistsError, match="is a finished store: give --add"):
        again(store, corpus, tokenizer)
    with pytest.raises(FileNotFoundError, match="holds no finished store to add to"):
        again(tmp_path / "none", corpus, tokenizer, add=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis\.txt\)"):
        again(tmp_path / "mine", corpus, tokenizer)
    with pytest.raises(FileExistsError, match="is a file, and a store is a folder"):
        again(tmp_path / "mine/thesis.txt", corpus, tokenizer)
    assert not (tmp_path / "none").exists() and os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_store_goes_on_with_the_same_corpus_tokenizer_and_settings_alone(store, corpus, tokenizer, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    other = train_tokenizer(["something else"] * 9, 64)
    (tmp_path / "more.txt").write_text("Text.")
    with pytest.raises(ValueError, match=r"was made with another tokenizer, corpus or setting .*tokenizer"):
        again(folder, tmp_path / "more.txt", other, add=True)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.txt").write_text("Fine.\n\n" * 900)
    (bad / "b.txt").write_bytes(b"Fine.\n\n" * 900 + b"\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        again(tmp_path / "half", bad, tokenizer, shard_bytes=6_000, processes=2)
    with pytest.raises(FileNotFoundError, match="is not finished: run the same fastbert prepare once more"):
        open_stores(tmp_path / "half")
    with pytest.raises(ValueError, match=r"was begun with another .*\(seed 0, now 5\): give the same"):
        again(tmp_path / "half", bad, tokenizer, shard_bytes=6_000, seed=5)
    (bad / "b.txt").write_bytes(b"Fine.\n\n" * 901)
    with pytest.raises(ValueError, match=r"was begun with another .*other files"):
        again(tmp_path / "half", bad, tokenizer, shard_bytes=6_000)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda store: shutil.rmtree(store / "00003"), "00003/train holds no token store"),
        (lambda store: (store / "00002/train/tokens.bin").write_bytes(b"xy"), r"tokens\.bin has 2 bytes, expected"),
        (lambda store: flip(store / "00004/held_out/tokens.bin"), r"tokens\.bin is damaged, its checksum differs"),
        (lambda store: flip(store / "counts.bin"), r"counts\.bin is missing or damaged"),
        (lambda store: swap(store / "00001", store / "00002"), "00001/train is another shard than"),
        (lambda store: (store / STORE).write_text("{"), r"store\.json is damaged"),
        (lambda store: (store / STORE).unlink(), "holds no token store"),
    ],
    ids=["missing", "cut short", "changed", "counts", "swapped", "index", "no index"],
)
def test_damage_is_found_and_said(store, tmp_path, damage, says):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_stores(folder, verify=True)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(one, other):
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)


def test_another_tokenizer_in_its_folder_is_noticed(store, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    save_tokenizer(train_tokenizer(["something else"] * 9, 64), folder / "tokenizer")
    with pytest.raises(ValueError, match="is another tokenizer than the store was written with"):
        read_tokenizer(folder)
    assert load_tokenizer(store / "tokenizer").get_vocab_size() == 512


def test_a_call_that_was_killed_at_its_very_end_is_ended(store, corpus, tokenizer, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    (folder / PLAN).write_text(json.dumps({"first": 0}))
    again(folder, corpus, tokenizer)
    assert content(folder) == content(store)


def test_each_shard_holds_out_documents_of_other_places(tokenizer, tmp_path):
    held_out = []
    for shard in (0, 1):
        (tmp_path / str(shard)).mkdir()
        documents, vocabulary = [[text] for text in TEXTS], Vocabulary.of(tokenizer)
        write_sides(tmp_path / str(shard), documents, Encoder(tokenizer), vocabulary, 0.1, seed=0, shard=shard)
        store = TokenStore.open(tmp_path / str(shard) / "held_out")
        held_out.append([store.document(i)[0].tolist() for i in range(len(store.documents) - 1)])
    assert len(held_out[0]) == len(held_out[1]) == 6 and held_out[0] != held_out[1]


def test_a_file_that_changes_while_it_is_read_is_noticed(corpus, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "corpus")
    write_missing = shards._write_missing

    def changed(*arguments):
        os.utime(tmp_path / "corpus/b.txt", ns=(1, 1))
        return write_missing(*arguments)

    monkeypatch.setattr(shards, "_write_missing", changed)
    with pytest.raises(ValueError, match=r"b\.txt was changed while the store was being written"):
        again(tmp_path / "store", tmp_path / "corpus", tokenizer)
