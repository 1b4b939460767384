"""The token store: written in one pass, mapped, checked."""

import errno
import json
import pickle
import resource
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.data import TokenStore, split_sentences, train_tokenizer, write_store, write_stores

DOCUMENTS = [split_sentences(text) for _, text in sorted(topics.items())][:60]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((s for d in DOCUMENTS for s in d), 512)


@pytest.fixture
def store(tmp_path, tokenizer):
    write_store(tmp_path / "store", DOCUMENTS, tokenizer, progress=False)
    return TokenStore.open(tmp_path / "store")


def ids(tokenizer, sentences):
    return [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]


def test_holds_what_the_tokenizer_gives(store, tokenizer):
    assert len(store.documents) - 1 == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        assert [sentence.tolist() for sentence in store.document(i)] == ids(tokenizer, document)
    assert store.tokens.dtype == np.uint16
    assert store.vocab_size == 512
    store.check_tokenizer(tokenizer)
    assert not store.tokens.flags.writeable


def test_by_hand(tmp_path):
    tokenizer = train_tokenizer(["aa bb"] * 9, 64)
    aa, bb = tokenizer.token_to_id("aa"), tokenizer.token_to_id("bb")
    documents = [["aa bb", "\u200b", "bb"], ["\u200b"], ["aa"]]  # a sentence of nothing but a zero-width space
    write_store(tmp_path / "store", iter(documents), tokenizer, progress=False)
    store = TokenStore.open(tmp_path / "store")
    assert store.tokens.tolist() == [aa, bb, bb, aa]
    assert store.sentences.tolist() == [0, 2, 3, 4]
    assert store.documents.tolist() == [0, 2, 3]
    counts = store.token_counts()
    assert counts[[aa, bb]].tolist() == [2, 2] and counts.sum() == 4 and len(counts) == tokenizer.get_vocab_size()


def test_large_vocabulary_takes_four_bytes(tmp_path, tokenizer):
    whole = json.loads(tokenizer.to_str())
    whole["model"]["vocab"] |= {f"w{i}": i for i in range(512, 70_000)}
    large = Tokenizer.from_str(json.dumps(whole))
    write_store(tmp_path / "store", [["w69999 w512"]], large, progress=False)
    store = TokenStore.open(tmp_path / "store")
    assert store.tokens.dtype == np.uint32 and store.tokens.tolist() == [69999, 512]


def test_special_tokens_in_the_text_are_text(tmp_path, tokenizer):
    write_store(tmp_path / "store", [["the [MASK] [SEP]"]], tokenizer, progress=False)
    assert 4 in tokenizer.encode("the [MASK] [SEP]").ids
    store = TokenStore.open(tmp_path / "store")
    assert tokenizer.decode(store.tokens.tolist()) == "the [ mask ] [ sep ]"


def test_split_is_a_partition_by_seed(tmp_path, tokenizer):
    numbered = [[f"{i} statement"] for i in range(200)]

    def split(seed, name):
        write_stores(tmp_path / name, numbered, tokenizer, held_out_fraction=0.1, seed=seed, progress=False)
        parts = [TokenStore.open(tmp_path / name / part) for part in ("train", "held_out")]
        return [[tokenizer.decode(np.concatenate(s.document(i)).tolist()) for i in range(len(s.documents) - 1)]
                for s in parts]  # fmt: skip

    train, held_out = split(1, "one")
    everything = [sentence for (sentence,) in numbered]
    decoded = [tokenizer.decode(i) for i in ids(tokenizer, everything)]
    assert sorted(train + held_out) == sorted(decoded)
    assert len(held_out) == 20
    # One of every ten, in the order of the corpus.
    assert [decoded.index(d) // 10 for d in held_out] == list(range(20))
    assert len({decoded.index(d) % 10 for d in held_out}) > 3
    assert split(1, "again") == [train, held_out]
    assert split(2, "other")[1] != held_out


@pytest.mark.parametrize("fraction", [0.0, 0.6, -1.0, float("nan")])
def test_fraction_out_of_range(tmp_path, tokenizer, fraction):
    with pytest.raises(ValueError, match=r"expected 0 < fraction <= 0\.5"):
        write_stores(tmp_path / "store", DOCUMENTS, tokenizer, held_out_fraction=fraction)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_failed_write(tmp_path, tokenizer):
    def documents():
        yield from DOCUMENTS
        raise RuntimeError("the corpus ended badly")

    with pytest.raises(RuntimeError, match="ended badly"):
        write_store(tmp_path / "store", documents(), tokenizer, progress=False)
    with pytest.raises(ValueError, match="hold no token"):
        write_store(tmp_path / "store", [], tokenizer, progress=False)
    with pytest.raises(ValueError, match="a corpus of 1 token cannot be split"):
        write_stores(tmp_path / "store", [["one"]], tokenizer, progress=False)
    assert not list(tmp_path.iterdir())


# Of 49 every 24th, and the last one, which this seed holds out, is a block of its own.
@pytest.mark.parametrize(("documents", "held_out"), [(1, 2), (19, 2), (20, 2), (49, 3), (60, 2), (1000, 20)])
def test_small_corpora_are_split_too(tmp_path, tokenizer, documents, held_out):
    """By the defaults of a run, 2 %; nothing is lost, and next-sentence prediction has its two documents."""
    corpus = [[f"statement {i} {j}" for j in range(20)] for i in range(documents)]
    write_stores(tmp_path / "s", corpus, tokenizer, held_out_fraction=0.02, nsp=documents > 1, progress=False)
    write_store(tmp_path / "all", corpus, tokenizer, progress=False)
    train, kept, whole = (TokenStore.open(tmp_path / name) for name in ("s/train", "s/held_out", "all"))
    assert len(kept.documents) - 1 == held_out
    assert len(train.tokens) + len(kept.tokens) == len(whole.tokens) and len(kept.tokens) >= 30
    assert np.array_equal(train.token_counts() + kept.token_counts(), whole.token_counts())
    if documents == 1:  # its end is held out, and with it the second half of that
        assert train.tokens.tolist() + kept.tokens.tolist() == whole.tokens.tolist()


def test_next_sentence_prediction_needs_two_documents_on_either_side(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"of 3 document\(s\) one side gets 1: .*--held-out.*--objective mlm"):
        write_stores(tmp_path / "s", [["one", "two"]], tokenizer, nsp=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_text_of_unknown_words_alone_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"all 9 tokens .* are \[UNK\].*none can be masked"):
        write_store(tmp_path / "s", [["\u0e01 \u0e02 \u0e03"]] * 3, tokenizer, progress=False)
    assert not list(tmp_path.iterdir())


def test_strings_in_place_of_lists_of_them_are_refused(tmp_path, tokenizer):
    for documents in (["the film was good", "I liked it"], "abc"):
        with pytest.raises(TypeError, match="documents are lists of sentences"):
            write_store(tmp_path / "s", documents, tokenizer, progress=False)
    with pytest.raises(TypeError, match="texts are several strings"):
        train_tokenizer("the film was good", 64)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(store, tokenizer):
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        write_store(store.folder, DOCUMENTS[:1], tokenizer, progress=False)
    assert len(TokenStore.open(store.folder).documents) - 1 == len(DOCUMENTS)


def test_leftovers_of_a_killed_run_are_replaced(tmp_path, tokenizer):
    program = (
        "import os, signal, sys; from fastbert.data import *\n"
        "def documents():\n"
        "    for i in range(12): yield ['statement ' * 10000]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_store(sys.argv[1], documents(), train_tokenizer(['statement'], 64), progress=False)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "store"])
    assert killed.returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".store.writing"]
    write_store(tmp_path / "store", DOCUMENTS, tokenizer, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    TokenStore.open(tmp_path / "store")


def test_full_disk(tmp_path, tokenizer):
    """A limit on file sizes stands for the full disk: the operating system refuses the same write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"raise the limit .*; .* run the same command again") as caught:
            write_store(tmp_path / "store", DOCUMENTS, tokenizer, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / ".store.writing/tokens.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tokens.bin", "sentences.bin", "documents.bin"])
def test_damage_is_found(store, name):
    file = store.folder / name
    good = file.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    file.write_bytes(bad)
    with pytest.raises(ValueError, match=rf"{name} is damaged, its checksum differs.*prepare the text again"):
        TokenStore.open(store.folder)
    TokenStore.open(store.folder, verify=False)
    file.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(good) - 1:,} bytes, expected {len(good):,}"):
        TokenStore.open(store.folder, verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name} has 0 bytes"):
        TokenStore.open(store.folder, verify=False)


def test_damaged_meta(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no token store"):
        TokenStore.open(tmp_path / "none")
    file = store.folder / "meta.json"
    good = file.read_text()
    for bad in (good[:-20], "[]", good.replace('"tokens"', '"x"'), good.replace("uint16", "nonsense")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"meta\.json is damaged"):
            TokenStore.open(store.folder)
    file.write_text(good.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="says format 2, this version reads format 1"):
        TokenStore.open(store.folder)


def test_another_tokenizer_is_noticed(store):
    other = train_tokenizer(["something else"] * 9, 64)
    with pytest.raises(ValueError, match=rf"of another tokenizer \(512 entries, this one has {other.get_vocab_size()}"):
        store.check_tokenizer(other)


def test_pickle_maps_again(store):
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).tokens, store.tokens)
