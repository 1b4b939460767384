"""Stores of many shards, added to, gone on with or damaged: nothing is overwritten, what does not hold is refused."""

import json
import os
import shutil

import numpy as np
import pytest
from shard_stores import again, content

from fastbert.data import load_tokenizer, open_stores, save_tokenizer, shard_writer, train_tokenizer
from fastbert.data.shards import PLAN, STORE, read_index, read_tokenizer


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


def test_a_file_that_changes_while_it_is_read_is_noticed(corpus, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "corpus")
    write_missing = shard_writer._write_missing

    def changed(*arguments):
        os.utime(tmp_path / "corpus/b.txt", ns=(1, 1))
        return write_missing(*arguments)

    monkeypatch.setattr(shard_writer, "_write_missing", changed)
    with pytest.raises(ValueError, match=r"b\.txt was changed while the store was being written"):
        again(tmp_path / "store", tmp_path / "corpus", tokenizer)
