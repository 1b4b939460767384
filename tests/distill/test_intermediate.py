"""TinyBERT's losses on the inside of two models, and which layer learns from which."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill import DistillConfig, distill
from fastbert.distill.intermediate import IntermediateLoss, layer_map, mean_squared, refuse_inside, watched
from fastbert.distill.training import Distiller
from fastbert.finetune.predict import load
from fastbert.finetune.training import Trainer
from fastbert.models import AlbertConfig, AlbertModel, BertConfig, BertModel
from fastbert.ops.attention_distillation import attention_distillation


def bert(layers, width, heads=2):
    return BertModel(BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def test_layer_maps():
    assert layer_map("uniform", 2, 12) == [6, 12] and layer_map("last", 2, 12) == [11, 12]
    assert layer_map([1, 5, 12], 3, 12) == layer_map("1, 5,12", 3, 12) == [1, 5, 12]
    for kind, layers in (("uniform", 13), ("last", 0), ([3, 3], 2), ([0, 3], 2), ("3,13", 2), ("3", 2), ("fist", 1),
                         ("3,", 2), ([], 0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"to the teacher's|increasing, from 1 to 12"):
            layer_map(kind, layers, 12)


def test_states_by_hand_with_masks_and_negative_numbers():
    x, teacher = torch.tensor([[[-1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[-3.0, 2.0], [1.0, -1.0]]])
    assert mean_squared(x, teacher) == mean_squared(x, teacher, torch.ones(1, 2)) == (4 / 2 + 5 / 2) / 2
    padded = [torch.cat([y, torch.full((1, 3, 2), fill)], 1) for y, fill in ((x, torch.nan), (teacher, 7.0))]
    assert mean_squared(*padded, torch.tensor([[1, 1, 0, 0, 0]])) == mean_squared(x, teacher)
    with pytest.raises(ValueError, match="a learned matrix maps another width"):
        mean_squared(x[..., :1], teacher)


@pytest.mark.parametrize("teacher_heads", [2, 4])
def test_all_losses_add_up_and_reach_the_student_alone(teacher_heads):
    torch.manual_seed(0)
    teacher, student = bert(4, 8, teacher_heads).eval().requires_grad_(False), bert(2, 4)
    ids, cu = torch.randint(1, 20, (7,)), torch.tensor([0, 5, 7], dtype=torch.int32)
    loss = IntermediateLoss(4, 2, 8, teacher_heads, layer_map("uniform", 2, 4))
    with watched(student) as mine, watched(teacher) as theirs:
        output = student(ids, cu_seqlens=cu, max_seqlen=5)
        expected = teacher(ids, cu_seqlens=cu, max_seqlen=5)
    got = loss(mine, theirs, cu, 5)
    torch.testing.assert_close(mine.states[-1], output.sequence_output)
    torch.testing.assert_close(theirs.states[-1], expected.sequence_output)
    weight, by_hand = loss.project.weight, 0
    pairs = [(mine.embeddings, theirs.embeddings), *zip(mine.states, theirs.states[1::2], strict=True)]
    for x, y in pairs:
        by_hand = by_hand + (x.double() @ weight.double().T - y.double()).square().mean()
    for x, y in zip(mine.qkv, theirs.qkv[1::2], strict=True):
        mine_by_head = [part.reshape(7, 2, -1) for part in (x[:, :4], x[:, 4:8])]
        theirs_by_head = [part.reshape(7, teacher_heads, -1) for part in (y[:, :8], y[:, 8:16])]
        by_hand = by_hand + attention_distillation(*mine_by_head, *theirs_by_head, cu, 5).double()
    torch.testing.assert_close(got.double(), by_hand, rtol=1e-6, atol=0)
    got.backward()
    assert all(x.grad is None for x in teacher.parameters()) and weight.grad.abs().sum() > 0
    first = student.encoder["layer"][0]
    assert first.attention["self"].qkv.weight.grad[:8].abs().min() > 0
    with watched(student) as after:
        pass
    student(ids, cu_seqlens=cu, max_seqlen=5)
    assert after.embeddings is None and not after.states, "hooks are gone"


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(ValueError, match="the teacher's 3 attention heads, got 2"):
        IntermediateLoss(8, 2, 6, 3, [1])
    albert = AlbertModel(AlbertConfig(
        vocab_size=20, embedding_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    ))  # fmt: skip
    with pytest.raises(ValueError, match="the teacher is a AlbertModel, whose layers share"):
        refuse_inside(albert, "teacher")


@pytest.fixture
def config(lesson, tmp_path):
    return DistillConfig(
        lesson / "teacher/model", "bert", lesson / "train.csv", tmp_path / "run", layers=1, batch_size=16, epochs=5,
        patience=2, intermediate_epochs=3, lr=1e-2, snapshot_every=4,
    )  # fmt: skip


@pytest.mark.parametrize("stops", [9, 20])  # in the stage on the inside, and in that on outputs
def test_a_narrower_student_learns_the_inside_then_outputs_and_resumes_in_the_same_bits(
    config, lesson, tmp_path, monkeypatch, stops
):
    encoder = BertModel.from_pretrained(lesson / "bert")
    narrow = dataclasses.replace(encoder.config, hidden_size=16, intermediate_size=32)
    BertModel(narrow).save_pretrained(tmp_path / "narrow", load_tokenizer(config.teacher))
    config = dataclasses.replace(config, student=str(tmp_path / "narrow"), layers=None)
    inside, of_inside = Distiller.inside_loss, []
    with monkeypatch.context() as counted:
        counted.setattr(Distiller, "inside_loss", lambda *some: of_inside.append(some[0].step) or inside(*some))
        distill(config)
    assert of_inside == list(range(18)), "three epochs of six steps"
    scores = json.loads((config.output / "scores.json").read_text())
    losses = [epoch["loss"] for epoch in scores["epochs"]]
    assert scores["best_epoch"] > 3, "before, no output was trained"
    assert len(losses) == 5, "patience does not count the first stage"
    assert losses[2] < 0.8 * losses[0], "the student comes nearer to the teacher's inside"
    take, steps = Trainer._take_step, []

    def step(self, places):
        steps.append(self.step)
        if len(steps) == stops:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, places)

    monkeypatch.setattr(Trainer, "_take_step", step)
    broken = dataclasses.replace(config, output=tmp_path / "broken")
    assert distill(broken) is None
    distill(broken, resume=True)
    assert steps == list(range(30))
    ours, theirs = (load_file(run.output / "model/model.safetensors") for run in (config, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
    assert not any("project" in name for name in ours), "the matrix is no part of the student"
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(config.output / "model").eval()
    ids = torch.arange(5, 12)
    mine = load(config.output / "model").eval()(ids[None]).logits
    torch.testing.assert_close(mine, loaded(ids[None]).logits, rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(config):
    for changes, why in (
        ({"intermediate_epochs": 5}, "intermediate_epochs must be from 0 to less than epochs, 5, got 5"),
        ({"layer_map": "2"}, "increasing, from 1 to 1, got"),
        ({"layer_map": "first"}, "a layer map is uniform or last"),
        ({"student": "textcnn", "layers": None}, "are of transformers, got --student textcnn"),
    ):
        with pytest.raises(ValueError) as error:
            distill(dataclasses.replace(config, **changes))
        assert why in str(error.value) and not config.output.exists()
