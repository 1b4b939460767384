"""Runs that go on from a model folder: its words and new ones, rows trained first, resumed without the folder."""

import dataclasses
import json
import shutil

import pytest
import torch
from pretrain_runs import bad
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from fastbert import RobertaConfig, RobertaForMaskedLM
from fastbert.data import load_tokenizer, save_tokenizer, train_byte_bpe, train_tokenizer, train_unigram
from fastbert.models.bert import BertForPreTraining
from fastbert.pretrain import init, step
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.run import read_config
from fastbert.pretrain.settings import PretrainConfig

TABLE, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
NEW = ["asynchronous", "Köln-Mülheim", "量子コンピュータ"]


@pytest.fixture
def going_on(corpus, finished, tmp_path):
    folder = shutil.copytree(finished / "model", tmp_path / "folder")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["the", *NEW, "ASYNCHRONOUS", ""]))
    return PretrainConfig(
        output=tmp_path / "run", corpus=corpus, init=folder, add_words=words, seq_len=32, batch_tokens=512, steps=4,
        rows_first=2, held_out=0.1, evaluations=1, evaluation_batches=2, snapshot_every=3, log_every=1, linear="torch",
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_new_words_have_the_mean_of_their_pieces_and_are_trained_first(going_on, transformers_quiet):
    before = weights(going_on.init)
    old = load_tokenizer(going_on.init)
    pieces = [old.encode(word, add_special_tokens=False).ids for word in NEW]
    assert all(len(ids) > 1 for ids in pieces[:2]) and pieces[2] == [1] * len(pieces[2]), "the last is all [UNK]"
    folder = pretrain(dataclasses.replace(going_on, steps=2))
    start, after = weights(going_on.output / "init"), weights(folder)
    for name, x in before.items():
        if name in (TABLE, BIAS):
            assert torch.equal(start[name][:1000], x) and torch.equal(after[name][:1000], x)
            expected = torch.stack([x[ids].mean(0) for ids in pieces])
            torch.testing.assert_close(start[name][1000:], expected, rtol=0, atol=1e-7)
        else:
            assert torch.equal(after[name], x), f"{name} moved in a step that was the new rows' alone"
    moved = (start[TABLE] != after[TABLE]).any(1)
    assert len(after[TABLE]) == 1003 and moved[1000:].all() and not moved[:1000].any()

    theirs = transformers_quiet.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    text = "Asynchronous köln-mülheim, 量子コンピュータは nonasynchronously [MASK]"
    assert theirs(text).input_ids == ours.encode(text).ids
    assert [i for i in ours.encode(text).ids if i >= 1000] == [ours.token_to_id(word) for word in NEW]
    transformers_quiet.BertForPreTraining.from_pretrained(folder)


def test_it_resumes_in_the_same_bits_when_the_folder_is_gone(going_on, tmp_path, monkeypatch):
    whole = pretrain(dataclasses.replace(going_on, output=tmp_path / "whole", steps=6))
    take = step.train_step

    def killed_at_5(*arguments, **words):
        if arguments[6] == 5:
            raise KeyboardInterrupt
        return take(*arguments, **words)

    monkeypatch.setattr(step, "train_step", killed_at_5)
    with pytest.raises(KeyboardInterrupt):
        pretrain(dataclasses.replace(going_on, steps=6))
    monkeypatch.setattr(step, "train_step", take)
    shutil.rmtree(going_on.init)
    going_on.add_words.unlink()
    folder = pretrain(read_config(going_on.output), resume=True)
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = weights(going_on.output / "init")["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(ours["bert.encoder.layer.0.output.dense.weight"], moved), "all is trained behind the rows"
    (going_on.output / "init/words.json").unlink()
    with pytest.raises(ValueError, match=r"init, the run's copy of the model that it went on from, cannot be used"):
        pretrain(read_config(going_on.output), resume=True)


@pytest.mark.parametrize("train", [train_tokenizer, train_byte_bpe, train_unigram])
def test_new_words_are_one_token_in_every_vocabulary(going_on, tmp_path, train, transformers_quiet):
    trained = train(["a few words of some text, words of a text, some few texts"] * 3, 300, lowercase=True)
    folder = tmp_path / "other"
    size = max(trained.get_vocab().values()) + 1
    RobertaForMaskedLM(RobertaConfig.preset("tiny", vocab_size=size)).save_pretrained(folder, trained)
    grown = init.extended_tokenizer(dataclasses.replace(going_on, init=folder))
    save_tokenizer(grown, tmp_path / "grown")
    theirs = transformers_quiet.AutoTokenizer.from_pretrained(tmp_path / "grown")
    expected = {
        "some Asynchronous words, asynchronous": ["asynchronous"] * 2, "the text": ["the"], "few texts": [],
        "量子コンピュータは": [NEW[2]],
    }  # fmt: skip
    for text, words in expected.items():
        ids = grown.encode(text).ids
        assert theirs(text).input_ids == ids
        assert [i for i in ids if i >= size] == [grown.token_to_id(word) for word in words]


def test_a_published_roberta_knows_a_word_by_the_space_before_it(tmp_path):
    trained = train_byte_bpe(["a few words of some text, words of a text, some few texts"] * 3, 300)
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = tmp_path / "words.txt"
    words.write_text("text\nasynchronous\n")
    assert len(trained.encode("text", add_special_tokens=False).ids) > 1
    assert init.new_words(words, trained) == ["asynchronous"], "Ġtext is a word that the model was trained on"
    _, *rest = trained.encode("a asynchronous", add_special_tokens=False).ids
    assert init.pieces("asynchronous", trained) == rest and len(rest) > 1


def test_the_folder_decides_sizes_and_dropout(going_on, tmp_path, recwarn):
    folder = tmp_path / "encoder"
    BertForPreTraining.from_pretrained(going_on.init).bert.save_pretrained(folder, going_on.init)
    plain = dataclasses.replace(going_on, init=folder, add_words=None, rows_first=0, steps=1)
    model = BertForPreTraining.from_pretrained(pretrain(plain))
    assert any("newly initialised" in str(warning.message) for warning in recwarn), "it says which heads are new"
    assert model.config == BertForPreTraining.from_pretrained(going_on.init).config
    dropped = dataclasses.replace(plain, output=tmp_path / "dropped", dropout=0.25)
    assert BertForPreTraining.from_pretrained(pretrain(dropped)).config.hidden_dropout_prob == 0.25
    stored = json.loads((plain.output / "config.json").read_text())
    assert (stored["model"], stored["lr"], stored["objective"]) == ("bert", 1e-4, "mlm+nsp")

    short = tmp_path / "short"
    sizes = dataclasses.replace(model.config, max_position_embeddings=64)
    BertForPreTraining(sizes).save_pretrained(short, going_on.init)
    phases = {"init": short, "seq_len": PretrainConfig.seq_len, "steps": 2}  # which is longer, and not what counts
    init.take_settings(dataclasses.replace(plain, phases=("16:0.5", "64:0.5"), **phases)).check()
    with pytest.raises(ValueError, match=r"at most what the model in .*short takes, 64 tokens, got 65"):
        init.take_settings(dataclasses.replace(plain, phases=("65:0.5", "16:0.5"), **phases))


def test_what_does_not_hold_gets_a_sentence(going_on, tmp_path, capsys, monkeypatch):
    def said(*arguments, corpus=going_on.corpus, folder=going_on.init):
        given = "--output", tmp_path / "new", "--corpus", corpus, "--init", folder, "--steps", 2, "--seq-len", 32
        text = bad(capsys, monkeypatch, "pretrain", *given, *arguments)
        assert not (tmp_path / "new").exists(), "something was written before the input was checked"
        return text

    assert "with --init the folder" in (text := said("--preset", "mini", "--vocab-size", 99)) and "vocab-size" in text
    assert "decides --model" in said("--model", "roberta")
    assert "there is no folder 'nowhere'" in said(folder="nowhere")
    assert "seq_len must be at most what the model" in said("--seq-len", 600, "--batch-tokens", 900)
    assert "give --rows-first with --add-words" in said("--rows-first", 2)
    assert "do not exist" in said("--add-words", tmp_path / "missing.txt")
    for content, message in (
        ("\n \n", "holds no word"), ("the\nTHE\n", "has every word of"),
        ("asynchronous\n\u0301\n", "of which the tokenizer leaves nothing"),
    ):  # fmt: skip
        going_on.add_words.write_text(content)
        assert message in said("--add-words", going_on.add_words)
    config = json.loads((going_on.init / "config.json").read_text())
    (going_on.init / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors is damaged" in said()
    (going_on.init / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    assert "architecture 't5': expected one of albert, bert, ernie, roberta" in said()
    with pytest.raises(ValueError, match="give --add-words with --init"):
        dataclasses.replace(going_on, init=None).check()
