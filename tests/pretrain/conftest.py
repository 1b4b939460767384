"""One small corpus and one run on it: Python's own manual, which comes with the standard library."""

import dataclasses
import pydoc_data.topics

import pytest
import together

from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.settings import PretrainConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "manual.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    return path


@pytest.fixture(scope="session")
def settings(corpus):
    return PretrainConfig(
        output=corpus, corpus=corpus, vocab_size=1000, seq_len=32, batch_tokens=512, steps=40, lr=3e-3, held_out=0.1,
        evaluations=2, evaluation_batches=4, snapshot_every=7, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory):
    """An unbroken run, to be read."""
    config = dataclasses.replace(settings, output=tmp_path_factory.mktemp("run") / "whole")
    pretrain(config)
    return config.output


@pytest.fixture(autouse=True)
def drawn_and_measured_once():
    """By `finished`, not by each test's own runs."""
    with together.quick():
        yield


@pytest.fixture(scope="session")
def transformers_quiet():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module
