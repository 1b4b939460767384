"""LAMB as its paper has it, and runs with it."""

import dataclasses
import shutil
import sys

import pytest
import torch
from pretrain_runs import assert_same_run, bad

from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain import lamb, shards
from fastbert.pretrain import run as runs
from fastbert.pretrain.loop import pretrain

pytest.importorskip("pytorch_optimizer")


def test_steps_are_those_of_the_paper():
    """Algorithm 2 of its third version, which has no bias correction, in float64; vectors take Adam's own steps."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=50, num_hidden_layers=1))
    optimizer = lamb.make_lamb(model, 0.1, 0.05, 0.98)
    truth = {param: param.detach().double() for param in model.parameters()}
    m, v = ({param: torch.zeros_like(x) for param, x in truth.items()} for _ in range(2))
    for lr in (0.05, 0.1, 0.02):
        for param in truth:
            param.grad = torch.randn_like(param)
        norm, factor = optimizer.clip_factor(1.0)
        expected = torch.cat([param.grad.flatten().double() for param in truth]).norm().item()
        assert norm.item() == pytest.approx(expected) and factor.item() == pytest.approx(1 / expected, 1e-5)
        for param, x in truth.items():
            g = param.grad.double() / expected
            m[param] = 0.9 * m[param] + 0.1 * g
            v[param] = 0.98 * v[param] + 0.02 * g * g
            update, scale = m[param] / (v[param].sqrt() + 1e-6), 1.0
            if param.dim() > 1:
                update += 0.1 * x
                scale = x.norm().clamp(max=10) / update.norm()
            truth[param] = x - lr * scale * update
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step(grad_factor=factor)
        for param, x in truth.items():
            torch.testing.assert_close(param.detach().double(), x, rtol=1e-4, atol=1e-5)


def test_what_several_processes_wrote_is_read(tmp_path):
    """The state that `torch.distributed.checkpoint` has made for it becomes the one written, and steps go on alike."""
    sizes, trained = BertConfig.preset("tiny", vocab_size=50, num_hidden_layers=1), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = BertForPreTraining(sizes)
        trained.append((model, lamb.make_lamb(model, 0.1, 0.05, 0.98)))

    def step(model, optimizer):
        torch.manual_seed(2)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step(grad_factor=optimizer.clip_factor(1.0)[1])
        optimizer.zero_grad()

    step(*trained[0])
    shards.save(*trained[0], tmp_path / "shards")
    shards.load(*trained[1], tmp_path / "shards")
    for each in trained:
        step(*each)
    weights, theirs = (model.state_dict() for model, _ in trained)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())
    assert [group["step"] for group in trained[1][1].param_groups] == [2, 2]


def test_a_run_learns_and_resumes_bit_for_bit(settings, tmp_path):
    """Over micro-batches, at the paper's rate for 64 sequences of up to 32 tokens."""
    config = dataclasses.replace(settings, output=tmp_path / "lamb", optimizer="lamb", accumulate=4, steps=20, lr=None)
    pretrain(config)
    kept = runs.read_config(config.output)
    assert kept.lr == pytest.approx(5e-3 * (64 / 32_768) ** 0.5) and lamb.usual_lr(512) == pytest.approx(6.25e-4)
    run = tmp_path / "resumed"
    shutil.copytree(config.output, run)
    shutil.rmtree(run / "snapshots/step-00000020")
    shutil.rmtree(run / "model")
    pretrain(runs.read_config(run), resume=True)
    assert_same_run(run, config.output)


def test_a_batch_is_learned():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForPreTraining(BertConfig.preset("tiny", **sizes))
    optimizer = lamb.make_lamb(model, 0.01, 2e-2, 0.98)
    ids, places = torch.randint(5, 50, (64,)), torch.arange(0, 64, 5)
    curve = []
    for _ in range(25):
        bounds = torch.tensor([0, 30, 64], dtype=torch.int32)
        loss = model(ids, cu_seqlens=bounds, max_seqlen=34, masked_positions=places, labels=ids[places]).loss
        loss.backward()
        optimizer.step(grad_factor=optimizer.clip_factor(1.0)[1])
        optimizer.zero_grad()
        curve.append(loss.item())
    assert curve[0] > 3.5 and curve[-1] < 0.5


def test_what_lamb_cannot_is_refused(settings, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new"
    given = "--output", out, "--corpus", settings.corpus, "--steps", 5, "--optimizer", "lamb"
    said = bad(capsys, monkeypatch, "pretrain", *given, "--embedding-update", "touched")
    assert "embedding_update must be all with optimizer lamb, which scales a step by the norm" in said
    own = dataclasses.replace(settings, optimizer="lamb")
    with pytest.raises(ValueError, match="rows_first must be left out with optimizer lamb"):
        dataclasses.replace(own, init=tmp_path, add_words=tmp_path, rows_first=5).check()
    with pytest.raises(ValueError, match="shard must be left out with optimizer lamb"):
        dataclasses.replace(own, shard=True).check()
    with pytest.raises(ValueError, match=r"capture must be false \(--no-capture\) with optimizer lamb, which counts"):
        dataclasses.replace(own, device="cuda").check()

    missing = lambda name: None if name == "pytorch_optimizer" else sys  # noqa: E731
    monkeypatch.setattr("fastbert.extras.find_spec", missing)
    said = bad(capsys, monkeypatch, "pretrain", *given)
    assert "--optimizer lamb needs pytorch_optimizer: pip install '.[lamb]'" in said and not out.exists()
