"""A student learns a pretrained model's inside on a corpus, and then a task."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from finetune_tables import make_encoder, rows
from pretrain_runs import bad, places
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")

from fastbert import cli
from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill import DistillConfig, GeneralConfig, distill, distill_general, general, students
from fastbert.models import BertModel
from fastbert.models.auto import ENCODERS, class_of
from fastbert.pretrain.processes import Processes


@pytest.fixture(scope="module")
def config(lesson, tmp_path_factory):
    """Of a teacher with two layers and its corpus of 40 documents, for a narrower student: one layer, more heads."""
    folder = tmp_path_factory.mktemp("general")
    tokenizer, small = load_tokenizer(lesson / "bert"), BertModel.from_pretrained(lesson / "bert").config
    torch.manual_seed(0)
    BertModel(dataclasses.replace(small, num_hidden_layers=2)).save_pretrained(folder / "teacher", tokenizer)
    texts = [row["text"] for row in rows(160, seed=3)]
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(texts[i : i + 4]) for i in range(0, 160, 4)))
    return GeneralConfig(
        folder / "teacher", "bert", folder / "corpus.txt", folder / "run", layers=1, width=16, heads=4, steps=24,
        lr=1e-2, batch_tokens=256, seq_len=32, held_out=0.2, evaluations=4, snapshot_every=7, log_every=1, accumulate=2,
        dropout=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(config):
    return distill_general(config)


def held_out(folder):
    return json.loads((folder / "scores.json").read_text())["held out"]


def test_the_student_comes_nearer_and_is_a_folder_for_the_second_stage(config, done, lesson, tmp_path):
    scores = held_out(config.output)
    assert [each["step"] for each in scores] == [6, 12, 18, 24]
    assert scores[-1]["loss"] < 0.8 * scores[0]["loss"]
    assert not any("project" in name or "inside" in name for name in load_file(done / "model.safetensors"))
    transformers = pytest.importorskip("transformers")
    loaded, ours = transformers.AutoModel.from_pretrained(done).eval(), BertModel.from_pretrained(done)
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(ours(ids).sequence_output, loaded(ids)[0], rtol=1e-4, atol=1e-5)
    sizes = ours.config
    assert (sizes.hidden_size, sizes.num_attention_heads, sizes.num_hidden_layers) == (16, 4, 1)
    second = DistillConfig(
        lesson / "teacher/model", str(done), lesson / "train.csv", tmp_path / "second", epochs=2, intermediate_epochs=1,
        batch_size=16,
    )  # fmt: skip
    assert distill(second) == tmp_path / "second/model"


def test_batches_count_by_their_tokens_and_evaluation_is_without_dropout(config, tmp_path, monkeypatch):
    compute, seen = general._Training._loss, []

    def loss(self, batch):
        seen.append((self.student.training, batch.filled_tokens, compute(self, batch)))
        return seen[-1][2]

    monkeypatch.setattr(general._Training, "_loss", loss)
    short = dataclasses.replace(config, steps=1, evaluations=1, output=tmp_path / "run")
    distill_general(short)
    record = json.loads((short.output / "metrics.jsonl").read_text().splitlines()[0])
    for training, given in ((True, record["loss"]), (False, held_out(short.output)[0]["loss"])):
        counts, losses = zip(*((n, x.item()) for trains, n, x in seen if trains is training), strict=True)
        assert len(set(counts)) > 1
        assert given == pytest.approx(sum(n * x for n, x in zip(counts, losses, strict=True)) / sum(counts), rel=1e-6)


def test_stopped_and_resumed_in_the_same_bits(config, done, tmp_path, monkeypatch):
    take, steps = general._Training._step, []

    def step(self, *others):
        steps.append(self.progress.step)
        if len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *others)

    monkeypatch.setattr(general._Training, "_step", step)
    broken = dataclasses.replace(config, output=tmp_path / "broken")
    assert distill_general(broken) is None
    monkeypatch.setattr(sys, "argv", ["fastbert", "distill", "--output", str(broken.output), "--resume"])
    with pytest.raises(SystemExit) as ended:  # the command knows by the run's folder which stage it is
        cli.main()
    assert ended.value.code == 0
    assert steps == list(range(24))
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (broken.output, config.output))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def killed(*_, **__):
    raise KeyboardInterrupt


def test_a_folders_student_has_the_dropout_that_is_asked_for(config):
    teacher = BertModel.from_pretrained(config.teacher, add_pooling_layer=False)
    student = students.make_encoder(
        dataclasses.replace(config, student=str(config.teacher), layers=None, width=None, heads=None), teacher
    )
    probabilities = {module.dropout_p for module in student.modules() if hasattr(module, "dropout_p")}
    assert probabilities == {0.1} and student.config.attention_probs_dropout_prob == 0.1
    assert all(torch.equal(x, student.state_dict()[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["roberta", "ernie"])
def test_other_kinds_of_model_and_a_kill_before_the_data_is_there(kind, config, tmp_path, monkeypatch):
    other = dataclasses.replace(
        config, teacher=make_encoder(kind, tmp_path / "teacher"), output=tmp_path / "run", steps=2, evaluations=1,
        width=None, heads=None, intermediate_size=48, seq_len=30, bf16=kind == "roberta",
    )  # fmt: skip
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("fastbert.pretrain.prepare.prepare_store", killed)
        distill_general(other)
    made = distill_general(other, resume=True)
    assert class_of(made, ENCODERS).from_pretrained(made, add_pooling_layer=False).config.intermediate_size == 48
    assert held_out(other.output)[-1]["step"] == 2


def test_texts_are_not_masked_and_losses_are_the_teachers_inside(config, done, tmp_path, monkeypatch):
    """With as many layers, of the same width, the student begins as the teacher, and nothing is left to learn."""
    seen = []
    take = general._Training._loss
    monkeypatch.setattr(general._Training, "_loss", lambda self, batch: seen.append(batch) or take(self, batch))
    same = dataclasses.replace(config, layers=2, width=None, heads=None, dropout=0.0, steps=1, output=tmp_path / "same")
    distill_general(same)
    record = json.loads((same.output / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] < 1e-9
    mask = load_tokenizer(config.teacher).token_to_id("[MASK]")
    assert seen and not any((batch.input_ids == mask).any() for batch in seen)


def test_what_does_not_hold_is_refused_before_anything_is_written(config, tmp_path, capsys, monkeypatch):
    new = dataclasses.replace(config, output=tmp_path / "new")
    for changes, why in (
        ({"width": 17}, "width must be a multiple of its 4 heads, got 17"),
        ({"width": 17, "heads": None}, "width must be a multiple of the teacher's 2 heads, got 17"),
        ({"heads": 3, "width": 15}, "a divisor or a multiple of the teacher's 2 attention heads, got 3"),
        ({"student": str(config.teacher), "layers": None, "width": None}, "--heads is of --student bert"),
        ({"layers": 3}, "it must have 1 to the teacher's 2, got 3"),
        ({"layers": None}, "--student bert needs --layers"),
        ({"seq_len": 64}, "seq_len must be at most what the teacher takes, 32, got 64"),
        ({"corpus": tmp_path / "none"}, "does not exist"),
        ({"steps": None}, "give --steps, --minutes or both"),
        ({"student": "textcnn", "layers": None}, "student must be bert or a model's folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            distill_general(dataclasses.replace(new, **changes))
        assert why in str(error.value) and not new.output.exists()
    arguments = [f"--corpus={config.corpus}", "--teacher", config.teacher, "--student", "bert", "--steps", 1]
    arguments += ["--output", new.output]
    assert "--student bert needs --layers" in bad(capsys, monkeypatch, "distill", *arguments)


class _Two(Processes):
    """As the first of two sees them before they exchange anything."""

    def first(self, make):
        return make()


def test_running_statistics_of_several_processes_are_refused(config, tmp_path, monkeypatch):
    sizes = dataclasses.replace(BertModel.from_pretrained(config.teacher).config, norm="batch")
    BertModel(sizes).save_pretrained(tmp_path / "batch", load_tokenizer(config.teacher))
    new = dataclasses.replace(config, teacher=tmp_path / "batch", output=tmp_path / "new")
    monkeypatch.setattr(general, "joined", lambda: contextlib.nullcontext(_Two(count=2)))
    with pytest.raises(ValueError, match="norm 'batch' keeps running statistics"):
        distill_general(new)
    assert not new.output.exists()


def test_two_processes_take_the_steps_of_one(config, done, tmp_path):
    given = {"output": tmp_path / "two"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and type(value) is not bool and field.name != "output":
            given[field.name] = value
    command = [str(x) for name, value in given.items() for x in (f"--{name.replace('_', '-')}", value)]
    code = "from fastbert.cli import main; main()"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, "distill", *command], env=os.environ | place, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for place in places(2)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running), said
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (given["output"], config.output))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=2e-3)
    scores = [
        json.loads((folder / "scores.json").read_text())["held out"] for folder in (given["output"], config.output)
    ]
    assert scores[0][0]["loss"] == pytest.approx(scores[1][0]["loss"], rel=1e-3)
