"""Stores of many shards: nothing lost, and the same bytes however they come about."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_stores import SHARD, TEXTS, again, content

from fastbert.data import PretrainBatches, TokenStore, iter_documents, open_stores, special_ids
from fastbert.data.shards import read_index, read_tokenizer
from fastbert.data.store import Joined
from fastbert.data.wordwise import Encoder
from fastbert.data.writer import Vocabulary, write_sides

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


def test_each_shard_holds_out_documents_of_other_places(tokenizer, tmp_path):
    held_out = []
    for shard in (0, 1):
        (tmp_path / str(shard)).mkdir()
        documents, vocabulary = [[text] for text in TEXTS], Vocabulary.of(tokenizer)
        write_sides(tmp_path / str(shard), documents, Encoder(tokenizer), vocabulary, 0.1, seed=0, shard=shard)
        store = TokenStore.open(tmp_path / str(shard) / "held_out")
        held_out.append([store.document(i)[0].tolist() for i in range(len(store.documents) - 1)])
    assert len(held_out[0]) == len(held_out[1]) == 6 and held_out[0] != held_out[1]


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
