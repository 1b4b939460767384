"""`fastbert distill` from tables to a student that predicts; broken off and resumed; what it refuses."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from finetune_tables import make_encoder, read, rows, write
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from fastbert import cli
from fastbert.distill import DistillConfig, distill
from fastbert.distill.losses import label_loss, logit_mse, soft_cross_entropy
from fastbert.distill.students import make_student
from fastbert.distill.training import Distiller
from fastbert.finetune import FinetuneConfig, finetune
from fastbert.finetune.predict import load
from fastbert.finetune.training import Trainer
from fastbert.models import BertModel
from fastbert.models.auto import AutoModel


@pytest.fixture
def config(lesson, tmp_path):
    return DistillConfig(
        lesson / "teacher/model", "textcnn", lesson / "train.csv", tmp_path / "run", batch_size=16, epochs=4, mix=1.0,
        unlabelled=(lesson / "more.txt",), embedding_size=16, width=16, lr=2e-2,
        dropout=0.1, snapshot_every=5,
    )  # fmt: skip


def said(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def of_run(config):
    scores = json.loads((config.output / "scores.json").read_text())
    return scores["epochs"], scores["best_epoch"], load_file(config.output / "model/model.safetensors")


@pytest.mark.parametrize("student", ["textcnn", "bilstm", "bert"])
def test_what_was_stopped_ends_in_the_same_bits_and_the_student_predicts(config, student, lesson, monkeypatch, capsys):
    layers = 1 if student == "bert" else None
    config = dataclasses.replace(config, student=student, layers=layers)
    distill(config)
    broken = dataclasses.replace(config, output=config.output.with_name("broken"))
    take, steps = Trainer._take_step, []

    def step(self, places):
        steps.append(self.step)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, places)

    monkeypatch.setattr(Trainer, "_take_step", step)
    assert distill(broken) is None
    assert "go on with: fastbert distill --output" in capsys.readouterr().out
    assert said(monkeypatch, "distill", "--output", broken.output, "--resume") == 0
    assert steps == list(range(44))
    (epochs, best, weights), (their_epochs, their_best, theirs) = of_run(config), of_run(broken)
    assert (epochs, best) == (their_epochs, their_best)
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    assert epochs[best - 1]["accuracy"] >= 0.7

    out = config.output / "new.jsonl"
    monkeypatch.setattr(sys, "argv", ["fastbert", "predict", *map(str, (
        config.output / "model", lesson / "new.csv", "--text", "text", "--output", out))])  # fmt: skip
    cli.main()
    predicted = [json.loads(line)["label"] for line in out.read_text().splitlines()]
    truth = [row["label"] for row in read(lesson / "new.csv")]
    assert sum(a == b for a, b in zip(predicted, truth, strict=True)) >= 16


def test_a_regression_is_taught_in_its_own_units(config, lesson, tmp_path):
    from fastbert.finetune import FinetuneConfig, finetune

    numbers = {"label": "number", "regression": True, "metric": "rmse", "lr": 1e-2, "epochs": 4, "batch_size": 16}
    teacher = finetune(FinetuneConfig(lesson / "bert", config.train, tmp_path / "teacher", **numbers))
    config = dataclasses.replace(config, teacher=teacher, **numbers | {"epochs": 10}, unlabelled=(), dropout=0.0)
    distill(config)
    scores = json.loads((config.output / "scores.json").read_text())
    assert scores["epochs"][scores["best_epoch"] - 1]["rmse"] < 35, "the numbers are 1000, 1050 and 1100"


def test_the_loss_is_of_the_teacher_and_for_those_that_have_one_of_the_label(config):
    logits, taught, targets = torch.randn(3, 3), torch.randn(3, 3), torch.tensor([2, 0])
    config = dataclasses.replace(config, label_weight=0.25, temperature=1.5)
    student = make_student(config, load(config.teacher))
    soft, label = soft_cross_entropy(logits, taught, 1.5), label_loss(logits[:2], targets)
    got = Distiller(config, student, [], targets, taught).output_loss(logits, taught, targets)
    torch.testing.assert_close(got, ((0.75 * soft[:2] + 0.25 * label).sum() + soft[2]) / 3)
    got = Distiller(dataclasses.replace(config, loss="mse"), student, [], targets, taught)
    expected = (0.75 * logit_mse(logits, taught)[:2] + 0.25 * label).sum() + logit_mse(logits, taught)[2]
    torch.testing.assert_close(got.output_loss(logits, taught, targets), expected / 3)


def test_a_smaller_bert_begins_as_the_teachers_last_layers_of_their_largest_numbers(config, tmp_path):
    teacher = load(config.teacher)
    sizes = dataclasses.replace(teacher.config, num_hidden_layers=4)
    deep = type(teacher)(sizes, teacher.labels)
    layers = deep.bert.encoder["layer"]
    with torch.no_grad():
        for inner, layer in enumerate(layers):
            layer.intermediate["dense"].weight[:56] *= 1e-3  # four of 64 are made and read by large weights
            layer.output.dense.weight[:, 56:60] *= 1e-3
            layer.intermediate["dense"].bias[60:] = torch.arange(4.0) + inner
    changed = dataclasses.replace(config, student="bert", layers=2, intermediate_size=4, dropout=0.3)
    student = make_student(changed, deep)
    got = student.bert.encoder["layer"]
    assert student.config.hidden_dropout_prob == 0.3 and len(got) == 2
    for ours, theirs in zip(got, (layers[1], layers[3]), strict=True):
        assert torch.equal(ours.intermediate["dense"].bias, theirs.intermediate["dense"].bias[60:])
        assert torch.equal(ours.intermediate["dense"].weight, theirs.intermediate["dense"].weight[60:])
        assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight[:, 60:])
        assert torch.equal(ours.attention["self"].qkv.weight, theirs.attention["self"].qkv.weight)
    assert torch.equal(student.classifier.weight, deep.classifier.weight)


def test_a_teacher_of_another_norm(config, tmp_path, capsys):
    known = load(config.teacher)
    teacher = type(known)(dataclasses.replace(known.config, norm="batch", num_hidden_layers=2), known.labels)
    for name, x in teacher.named_buffers():
        if name.endswith("running_mean"):
            x.normal_()
    teacher.save_pretrained(tmp_path / "batch", config.teacher)
    config = dataclasses.replace(
        config, teacher=tmp_path / "batch", student="bert", layers=1, epochs=2, intermediate_epochs=1
    )
    begins, last = (model.bert.encoder["layer"][-1].output.norm for model in (make_student(config, teacher), teacher))
    assert torch.equal(begins.running_mean, last.running_mean), "running statistics are part of a layer"
    distill(config)
    assert "fastbert loads it; transformers cannot, as it has no batch norm" in capsys.readouterr().out
    trained = load(config.output / "model").bert.encoder["layer"][0].output.norm
    assert not torch.equal(trained.running_mean, begins.running_mean)


def test_another_teacher_is_refused_when_a_run_goes_on(config, tmp_path, monkeypatch):
    folder, epoch = tmp_path / "teacher", Trainer.epoch
    shutil.copytree(config.teacher, folder)
    config = dataclasses.replace(config, teacher=folder, unlabelled=(), epochs=2)

    def stopped(self):
        os.kill(os.getpid(), signal.SIGINT)
        yield from epoch(self)

    with monkeypatch.context() as during:
        during.setattr(Trainer, "epoch", stopped)
        assert distill(config) is None
    teacher = load(folder)
    with torch.no_grad():
        teacher.classifier.bias[0] += 1
    teacher.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"are not those that the run in .* began with"):
        distill(config, resume=True)


def test_what_does_not_hold_is_refused_before_anything_is_written(config, lesson, tmp_path):
    def refused(**changes):
        with pytest.raises((ValueError, OSError)) as error:
            distill(dataclasses.replace(config, **changes))
        assert not config.output.exists()
        return str(error.value)

    other, short = make_encoder("roberta", tmp_path / "roberta"), BertModel.from_pretrained(lesson / "bert").config
    short = BertModel(dataclasses.replace(short, max_position_embeddings=16))
    short.save_pretrained(tmp_path / "short", lesson / "bert")
    table = rows(96)
    table[5]["label"] = "splendid"
    for changes, why in (
        ({"student": "gru"}, "student must be textcnn, bilstm, bert or a model's folder, got 'gru'"),
        ({"student": "bert"}, "--student bert needs --layers"),
        ({"student": "bert", "layers": 2}, "layers must be from 1 to the teacher's, 1, got 2"),
        ({"intermediate_size": 8}, "--intermediate-size is of --student bert"),
        ({"student": str(other)}, "has another tokenizer than the teacher"),
        ({"student": str(tmp_path / "short")}, "takes 16 tokens, the teacher"),
        ({"temperature": 0}, "temperature must be from 0.01 to 1000"),
        ({"label_weight": 1.5}, "label_weight must be from 0 to 1"),
        ({"teacher": lesson / "bert"}, "expected a classifier's folder"),
        ({"regression": True, "label": "number"}, "predicts classes: leave --regression out"),
        ({"pair": "second", "unlabelled": ()}, "was trained on single texts: leave --pair second out"),
        ({"train": write(tmp_path / "odd.csv", table)}, "no class of the teacher has the label 'splendid'"),
        ({"unlabelled": (tmp_path / "none.txt",)}, "none.txt does not exist"),
        ({"unlabelled": (), "store": tmp_path}, "--store keeps what the teacher makes of --unlabelled"),
        ({"pair": "second"}, "--unlabelled and --augment are of single texts"),
        ({"onnx": True, "student": "bert", "layers": 1}, "onnx must be left out but for textcnn and bilstm"),
        ({"seq_len": 99}, "seq_len must be at most what the model takes, 32"),
        ({"store": lesson / "teacher"}, "is no store of labels, it holds"),
        ({"store": lesson / "train.csv"}, "is no folder, and a store of labels is one"),
    ):  # fmt: skip
        assert why in refused(**changes), changes


def test_hard_attention_is_finetuned_and_distilled_without_dropout(lesson, tmp_path):
    """A folder of it trains with its own dropout; another, which would drop weights, is refused before a folder is."""
    encoder = make_encoder("bert", tmp_path / "hard", attention_kind="gumbel")
    task = FinetuneConfig(encoder, lesson / "train.csv", tmp_path / "task", lr=1e-2, epochs=2)
    classifier = finetune(task)
    table = lesson / "train.csv"
    student = DistillConfig(lesson / "teacher/model", str(encoder), table, tmp_path / "student", epochs=1)
    smaller = DistillConfig(classifier, "bert", table, tmp_path / "smaller", layers=1, epochs=1)
    for trained in (classifier, distill(student), distill(smaller)):
        assert AutoModel.from_pretrained(trained).config.attention_kind == "gumbel"
    why = r"dropout must be 0 \(--dropout 0\), or left out for the folder's, .* attention_kind gumbel.* got 0.1"
    for run, config in ((finetune, task), (distill, student), (distill, smaller)):
        with pytest.raises(ValueError, match=why):
            run(dataclasses.replace(config, output=tmp_path / "refused", dropout=0.1))
    assert not (tmp_path / "refused").exists()
