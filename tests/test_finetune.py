"""`fastbert finetune` and `predict`: every encoder learns, transformers reads the result, the best epoch is kept."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from finetune_tables import SIGNS, make_encoder, read, rows, write

pytest.importorskip("sklearn")

from fastbert import BertConfig, BertForSequenceClassification, cli
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.finetune import FinetuneConfig, PredictConfig, finetune, loop, predict, scores, training
from fastbert.models.auto import AutoModel
from fastbert.models.classification import CLASSIFIERS


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return write(folder / "train.csv", rows(96)), write(folder / "new.csv", rows(24, seed=1))


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    return lambda kind: make_encoder(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def bert(encoder_of):
    return encoder_of("bert")


def of_transformers(folder, tables, pair=None):
    """Its logits [N, labels] for the new texts, padded and truncated, and its configuration."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = read(tables[1])
    second = None if pair is None else [row[pair] for row in texts]
    longest = model.config.max_position_embeddings - 2 * (model.config.model_type == "roberta")
    batch = tokenizer([row["text"] for row in texts], second, padding=True, truncation=True, max_length=longest,
                      return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        return model(**batch).logits, model.config


@pytest.mark.parametrize("kind", ["bert", "albert", "roberta", "ernie"])
def test_every_encoder_learns_and_transformers_reads_the_classifier(encoder_of, tables, tmp_path, kind):
    pair = "second" if kind == "ernie" else None
    folder = finetune(
        FinetuneConfig(
            encoder_of(kind), tables[0], tmp_path / "out", pair=pair, lr=1e-2, epochs=12, patience=12, batch_size=16
        )
    )
    stored = json.loads((tmp_path / "out/scores.json").read_text())
    best = stored["epochs"][stored["best_epoch"] - 1]
    assert best["accuracy"] == max(each["accuracy"] for each in stored["epochs"]) >= 0.75
    assert (tmp_path / "out/confusion.png").read_bytes().startswith(b"\x89PNG")

    predict(PredictConfig(folder, tables[1], text="text", pair=pair, output=tmp_path / "new.jsonl", batch_tokens=50))
    ours = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    logits, config = of_transformers(folder, tables, pair)
    labels = list(config.id2label.values())
    assert labels == sorted(SIGNS) and type(ours[0]["probabilities"]) is dict
    expected = logits.softmax(-1)
    torch.testing.assert_close(
        torch.tensor([[each["probabilities"][name] for name in labels] for each in ours]), expected, rtol=0, atol=1e-4
    )
    assert [each["label"] for each in ours] == [labels[i] for i in logits.argmax(-1)]
    with pytest.raises(
        ValueError, match=r"on pairs of .*\(--pair\)" if pair else "on single texts: leave --pair second"
    ):
        predict(PredictConfig(folder, tables[1], text="text", pair=None if pair else "second"))
    truth = [row["label"] for row in read(tables[1])]
    assert np.mean([each["label"] == label for each, label in zip(ours, truth, strict=True)]) >= 0.75


def test_a_regression_gives_numbers_in_their_own_units(bert, tables, tmp_path, capsys):
    config = FinetuneConfig(
        bert, tables[0], tmp_path / "out", evaluate=tables[1], label="number", regression=True, lr=1e-2, epochs=6,
        metric="rmse",
    )  # fmt: skip
    folder = finetune(config)
    stored = json.loads((tmp_path / "out/scores.json").read_text())["epochs"]
    best = min(stored, key=lambda each: each["rmse"])
    assert best["pearson"] > 0.9 and best["rmse"] < 25, "the numbers are 1000, 1050 and 1100"
    assert (tmp_path / "out/predictions.png").exists()
    capsys.readouterr()
    predict(PredictConfig(folder, tables[1], text="text"))
    header, *numbers = capsys.readouterr().out.splitlines()
    assert header == "number"
    logits, _ = of_transformers(folder, tables)
    np.testing.assert_allclose([float(x) for x in numbers], logits[:, 0].numpy(), rtol=1e-5)
    truth = np.array([float(row["number"]) for row in read(tables[1])])
    rmse = math.sqrt(np.mean((logits[:, 0].numpy() - truth) ** 2))
    assert rmse == pytest.approx(best["rmse"], rel=1e-3)


def test_the_best_epoch_is_kept_and_unread_words_keep_their_bits(bert, tables, tmp_path, monkeypatch, capsys):
    measured, states = iter([0.5, 0.9, 0.9, 0.7]), []

    def recorded(model, encoded, config, tokens):
        states.append({name: x.clone() for name, x in model.state_dict().items()})
        return torch.zeros(len(encoded), 3)

    monkeypatch.setattr(loop, "class_scores", lambda *_: {"accuracy": next(measured)})
    monkeypatch.setattr(training, "logits_of", recorded)
    folder = finetune(FinetuneConfig(bert, tables[0], tmp_path / "out", epochs=9, patience=2))
    assert "no better for 2 epochs: the model of epoch 2 is kept" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out/scores.json").read_text())
    assert stored["best_epoch"] == 2 and len(stored["epochs"]) == len(states) == 4
    kept = CLASSIFIERS["bert"].from_pretrained(folder).state_dict()
    assert all(torch.equal(x, states[1][name]) for name, x in kept.items())

    table = "bert.embeddings.word_embeddings.weight"
    before = AutoModel.from_pretrained(bert).embeddings.word_embeddings.weight
    tokenizer = load_tokenizer(bert)
    seen = sorted({i for row in read(tables[0]) for i in tokenizer.encode(row["text"]).ids})
    unread = [i for i in range(len(before)) if i not in seen]
    assert len(unread) > 20 and torch.equal(kept[table][unread], before[unread])
    assert (kept[table] != before).any(1).sum() >= len(seen) - 10, "a held-out row may hold a word alone"


def test_the_same_seed_gives_the_same_bits_whatever_the_folder_lacks(bert, tables, tmp_path):
    AutoModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(tmp_path / "bare", bert)
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(len(weights))
        with pytest.warns(UserWarning, match=r"lacks pooler\.dense\.weight, .*newly initialised"):
            folder = finetune(
                FinetuneConfig(tmp_path / "bare", tables[0], tmp_path / name, epochs=1, seed=seed, bf16=True)
            )
        weights.append(CLASSIFIERS["bert"].from_pretrained(folder).state_dict())
    same, other = ([torch.equal(x, each[name]) for name, x in weights[0].items()] for each in weights[1:])
    assert all(same) and not all(other)


def test_scores_by_hand():
    """Class 0: 2 of precision 1, recall 1/2; class 1: precision 2/3, recall 1."""
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert scores.class_scores(truth, predicted) == pytest.approx(
        {"accuracy": 3 / 4, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / math.sqrt(12)}
    )
    found = scores.number_scores(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 5.0]))
    assert found == pytest.approx(
        {"pearson": 3 / math.sqrt(12), "spearman": math.sqrt(3) / 2, "rmse": math.sqrt(5 / 3)}
    )
    assert math.isnan(scores.number_scores(np.array([1.0, 2.0]), np.array([3.0, 3.0]))["pearson"])
    nan = math.nan
    cases = [(1, None, "f1"), (2, 1, "f1"), (1, 2, "rmse"), (1, nan, "f1"), (nan, None, "f1")]
    assert all(scores.better(*case) for case in cases)
    assert not any(scores.better(*case) for case in [(1, 1, "f1"), (2, 1, "rmse"), (nan, 1, "f1"), (nan, nan, "f1")])


def said(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return str(ended.value)


def test_bad_input_gets_a_sentence_and_nothing_is_written(bert, tables, tmp_path, monkeypatch):
    bad = tmp_path / "bad.csv"

    def refused(*arguments, train=bad):
        text = said(monkeypatch, "finetune", "--init", bert, "--train", train, "--output", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and "Traceback" not in text
        return text

    good = rows(12)
    changed = {
        "one class": [row | {"label": "good"} for row in good],
        "empty text": [*good, good[0] | {"text": " "}],
        "empty label": [*good, good[0] | {"label": ""}],
        "a number": [*good, good[0] | {"label": "0.75"}],
        "numbers": [row | {"label": f"{i / 7:.3f}"} for i, row in enumerate(good)],
        "all different": [row | {"label": f"label {i}"} for i, row in enumerate(good)],
        "a rare class": [*good, good[0] | {"label": "once"}],
    }
    messages = {
        "one class": "all labels in the column 'label' of .* are 'good': a classifier needs two classes",
        "empty text": "1 rows without anything in the column 'text', the first in line 14: fill",
        "empty label": "1 rows without anything in the column 'label', the first in line 14: fill",
        "a number": "line 14: the label '0.75' is a number, and others are words such as 'good': mend it",
        "numbers": "are numbers such as '0.000': pass --regression",
        "all different": "12 different labels in 12 rows: a class needs several texts",
        "a rare class": r"too small to hold out 1 of 13 rows .*\(the rarest, 'once', has 1\): give more examples",
    }
    for what, table in changed.items():
        write(bad, table)
        assert re.search(messages[what], refused()), what
    write(bad, good)
    assert "has no column 'review': expected one of ['text'" in refused("--text", "review")
    assert "line 2: the label 'good' is no number, as --regression asks for" in refused("--regression")
    assert "metric must be for a regression one of pearson" in refused("--regression", "--metric", "f1")
    assert "seq_len must be at most what the model takes, 32, got 99" in refused("--seq-len", 99, train=tables[0])
    other = write(tmp_path / "other.csv", [good[0] | {"label": "great"}])
    assert "has the label 'great', those there are 'good', 'poor'" in refused("--evaluate", other, train=tables[0])
    assert "does not exist" in refused(train=tmp_path / "missing.csv")
    (tmp_path / "text.txt").write_text("a\n")
    assert "is read as plain text, which has no column 'text'" in refused(train=tmp_path / "text.txt")
    assert "line 1: the field 'text' must be a string or null, got 5" in refused(
        train=write_lines(tmp_path / "bad.jsonl", ['{"text": 5, "label": 1}'])
    )
    folder = tmp_path / "there"
    folder.mkdir()
    assert "is there already" in said(monkeypatch, "finetune", "--init", bert, "--train", tables[0], "--output", folder)
    assert "expected a classifier's folder, such as model/ of fastbert finetune" in said(
        monkeypatch, "predict", bert, tables[1], "--text", "text"
    )
    assert "output must be a .jsonl, .csv or .tsv" in said(
        monkeypatch, "predict", bert, tables[1], "--text", "text", "--output", tmp_path / "x.txt"
    )
    assert "is a table: say which column holds the text (--text), one of ['text', 'second'" in said(
        monkeypatch, "predict", bert, tables[1]
    )
    before = tables[1].read_bytes()
    assert "new.csv would be written over by what is predicted: choose another --output" in said(
        monkeypatch, "predict", bert, tables[1], "--text", "text", "--output", tables[1]
    )
    assert tables[1].read_bytes() == before


def test_an_albert_that_says_it_is_a_bert_is_refused(encoder_of, tables, tmp_path, monkeypatch):
    folder = encoder_of("albert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    for command in (
        ["finetune", "--init", folder, "--train", tables[0]],
        ["embed", folder, tables[1], "--text", "text"],
        ["pretrain", "--init", folder, "--corpus", tables[0], "--column", "text", "--steps", 1],
    ):
        text = said(monkeypatch, *command, "--output", tmp_path / "out.npy")
        assert "encoder.layer.0.attention.self.query.weight" in text and "does not hold the encoder that its" in text
        assert not list(tmp_path.iterdir()), command[0]


def test_a_tokenizer_of_another_model_is_refused(bert, tables, tmp_path, monkeypatch):
    small = BertConfig.preset("tiny", vocab_size=20)
    BertForSequenceClassification(small, ["a", "b"]).save_pretrained(tmp_path / "small")
    save_tokenizer(load_tokenizer(bert), tmp_path / "small")
    rule = r"the tokenizer gives ids up to \d+, and the model has 20 words: they do not belong together"
    commands = (
        ["finetune", "--init", tmp_path / "small", "--train", tables[0], "--output", tmp_path / "out"],
        ["predict", tmp_path / "small", tables[1], "--text", "text", "--output", tmp_path / "out.csv"],
        ["embed", tmp_path / "small", tables[1], "--text", "text", "--output", tmp_path / "out.npy"],
    )
    for command in commands:
        assert re.search(rule, said(monkeypatch, *command)), command[0]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path
