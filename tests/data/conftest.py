"""A corpus of two files, a tokenizer of 512 tokens, and their store of nine shards, to be read."""

import pytest
from shard_stores import TEXTS, again

from fastbert.data import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:20]))
    (folder / "b.txt").write_text("\n\n".join(TEXTS[20:]))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 512)


@pytest.fixture(scope="session")
def store(tmp_path_factory, corpus, tokenizer):
    """Written by this process alone."""
    folder = tmp_path_factory.mktemp("prepared") / "store"
    again(folder, corpus, tokenizer)
    return folder
