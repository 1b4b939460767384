"""Runs on Chinese text: words that jieba finds, that stand apart, and of a dictionary; made once, and kept."""

import dataclasses
import json
import shutil

import pytest
from pretrain_runs import assert_same_run

from fastbert.data import Words, load_tokenizer, open_stores
from fastbert.pretrain import run as runs
from fastbert.pretrain.loop import pretrain

APART = "却说 诸葛亮 说 明天 下雨 ， 我们 在 New York 等 他 。\n周瑜 道 ： 孔明 真 神人 也 ！ 二〇〇八年 再 会 。\n\n"
TOGETHER = APART.replace(" ", "").replace("NewYork", "New York")


@pytest.fixture
def chinese(settings, tmp_path):
    """Forty documents, with and without spaces; a run on the first."""
    for name, text in (("apart", APART), ("together", TOGETHER)):
        (tmp_path / f"{name}.txt").write_text(text * 40)
    (tmp_path / "names.txt").write_text("诸葛亮\n二〇〇八年\n孔明真\n𠮷野\n")
    return dataclasses.replace(
        settings, corpus=tmp_path / "apart.txt", output=tmp_path / "run", vocab_size=128, objective="mlm", steps=8,
        masking="word", words="spaces",
    )  # fmt: skip


def test_spaces_are_boundaries_and_no_text(chinese, tmp_path):
    pretrain(chinese)
    together = dataclasses.replace(
        chinese, corpus=tmp_path / "together.txt", output=tmp_path / "together", words=None, masking="token", steps=1
    )
    pretrain(together)
    tokenizers = [load_tokenizer(config.output / "tokenizer") for config in (chinese, together)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    apart, plain = (open_stores(config.output / "data")[0] for config in (chinese, together))
    ids, continued = apart.ids_and_words(apart.tokens)
    assert (ids == plain.tokens).all() and continued.mean() > 0.2 and plain.words is None
    # The corpus is not read again, and the run goes on bit for bit.
    shutil.copytree(chinese.output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/snapshots/step-00000008")
    shutil.rmtree(tmp_path / "again/model")
    pretrain(runs.read_config(tmp_path / "again"), resume=True)
    assert_same_run(tmp_path / "again", chinese.output)


def test_a_dictionary_and_jieba(chinese, tmp_path, capsys):
    config = dataclasses.replace(
        chinese, corpus=tmp_path / "together.txt", words="jieba", dictionary=tmp_path / "names.txt", workers=1
    )
    pretrain(config)
    said = capsys.readouterr().out
    assert "of the dictionary's 4 words 1 have a character that the vocabulary lacks, such as 𠮷野" in said
    store, words = open_stores(config.output / "data")[0], ("诸葛亮", "二〇〇八年", "孔明真", "𠮷野")
    store.check_words(Words("jieba", words))
    assert json.loads((config.output / "corpus.json").read_text())["data"]["words"] == Words("jieba", words).meta()
    # Other words make another store, of the same tokenizer; what was kept is not overwritten.
    before = (config.output / "tokenizer/tokenizer.json").stat().st_mtime_ns
    for name in ("config.json", "metrics.jsonl", "loss.png"):
        (config.output / name).unlink()
    for name in ("snapshots", "tensorboard", "model"):
        shutil.rmtree(config.output / name)
    pretrain(dataclasses.replace(config, words=None))
    assert open_stores(config.output / "data")[0].words == Words(None, words).meta()
    assert (config.output / "tokenizer/tokenizer.json").stat().st_mtime_ns == before
