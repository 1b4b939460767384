"""The store of what a teacher makes of unlabelled texts: its values, how it is gone on with, what it refuses."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from fastbert import lock
from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill import DistillConfig, labels
from fastbert.distill.labels import Source, label
from fastbert.distill.training import Distiller
from fastbert.finetune.predict import load


@pytest.fixture
def config(lesson, tmp_path, monkeypatch):
    """Stores of parts of 32 texts."""
    monkeypatch.setattr(labels, "PART", 32)
    return DistillConfig(
        lesson / "teacher/model", "textcnn", lesson / "train.csv", tmp_path / "out", unlabelled=(lesson / "more.txt",),
        store=tmp_path / "store",
    )  # fmt: skip


def made(config):
    teacher = load(config.teacher)
    return label(Source.of(config, teacher), teacher, load_tokenizer(config.teacher), config)


def test_it_holds_the_teachers_logits_in_bfloat16_and_is_made_once(config, monkeypatch):
    store = made(config)
    texts = config.unlabelled[0].read_text().split("\n")[1:]
    assert len(store) == 100 and len(store.parts) == 4
    encoded, logits = store.take(torch.tensor([99, 0, 31, 32]))
    teacher, tokenizer = load(config.teacher), load_tokenizer(config.teacher)
    for place, each, given in zip((99, 0, 31, 32), encoded, logits, strict=True):
        ids = tokenizer.encode(texts[place]).ids
        assert each.ids == ids
        expected = teacher(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(given, expected.bfloat16().float(), rtol=2**-7, atol=0)
    monkeypatch.setattr(labels, "logits_of", None)  # would be called for what is not there
    assert torch.equal(made(config).take(torch.arange(100))[1], store.take(torch.arange(100))[1])


def test_labelling_that_is_broken_off_goes_on_behind_its_last_part(config, monkeypatch):
    whole = made(dataclasses.replace(config, store=config.store.with_name("whole")))
    compute, calls = labels.logits_of, []

    def counted(model, encoded, *rest):
        calls.append(len(encoded))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if len(calls) == 4:
            raise MemoryError
        return compute(model, encoded, *rest)

    monkeypatch.setattr(labels, "logits_of", counted)
    assert made(config) is None
    with pytest.raises(MemoryError):
        made(config)
    store = made(config)
    assert calls == [32, 32, 32, 4, 4]
    assert torch.equal(store.take(torch.arange(100))[1], whole.take(torch.arange(100))[1])


def test_a_store_of_something_else_is_refused(config, lesson, tmp_path):
    made(config)
    short = dataclasses.replace(config, seq_len=5)
    with pytest.raises(ValueError, match="not those asked for, its tokens of a text differing: name another --store"):
        made(short)
    more = tmp_path / "more.txt"
    more.write_text(config.unlabelled[0].read_text().replace("story", "night"))
    with pytest.raises(ValueError, match="its texts differing"):
        made(dataclasses.replace(config, unlabelled=(more,)))
    teacher = load(config.teacher)
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-3
    with pytest.raises(ValueError, match="its teacher differing"):
        label(Source.of(config, teacher), teacher, load_tokenizer(config.teacher), config)
    with torch.no_grad():
        teacher.classifier.bias[0] = torch.inf
    endless = dataclasses.replace(config, store=tmp_path / "endless")
    with pytest.raises(ValueError, match="are not finite: it diverged"):
        label(Source.of(endless, teacher), teacher, load_tokenizer(config.teacher), endless)
    with lock.hold(config.store), pytest.raises(BlockingIOError, match="labels texts there"):
        made(config)
    with pytest.raises(ValueError, match=r"is no store of labels, it holds \w+"):
        made(dataclasses.replace(config, store=lesson / "teacher"))
    part = config.store / "part-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00001\.safetensors does not match the checksum"):
        made(config)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00001\.safetensors"):
        made(config)
    assert json.loads((config.store / "manifest.json").read_text())["of"]["count"] == 100


def test_an_epoch_has_every_labelled_text_and_the_next_unlabelled_ones(config):
    store, teacher = made(config), load(config.teacher)
    trainer = Distiller(
        dataclasses.replace(config, mix=3.0), teacher, store.take(torch.arange(20))[0], torch.zeros(20).long(),
        torch.zeros(20, 3), store,
    )  # fmt: skip
    epochs = [trainer.order(number).numpy() for number in range(5)]
    assert all(sorted(each[each < 20]) == list(range(20)) and len(each) == trainer.texts == 80 for each in epochs)
    assert len({tuple(each) for each in epochs}) == 5
    unlabelled = np.concatenate([each[each >= 20] for each in epochs]) - 20  # 300: each of 100 three times
    assert np.bincount(unlabelled).tolist() == [3] * 100
    first, second = (set(each[each >= 20]) for each in epochs[:2])
    assert len(first) == 60 and len(first | second) == 100, "the second epoch first takes what the first one left"
