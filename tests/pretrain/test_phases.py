"""Runs whose sequences become longer on the way."""

import dataclasses
import shutil

import pytest
from pretrain_runs import assert_same_run, bad

from fastbert.capture import Layout
from fastbert.pretrain import run as runs
from fastbert.pretrain import snapshot, step
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.phases import current_phase, parse_phases, phase_ends
from fastbert.pretrain.report import read_metrics


def test_phases_by_hand():
    phases = parse_phases(["128:0.9", "512:0.1"])
    assert phases == [(128, 0.9), (512, 0.1)] and phase_ends(phases, 1000) == [900, 1000]
    assert [current_phase(phases, done, 1000) for done in (0, 899, 900, 999, 1000)] == [0, 0, 1, 1, 1]
    thirds = parse_phases(["8:0.3333333", "16:0.3333333", "32:0.3333334"])
    assert phase_ends(thirds, 3) == [1, 2, 3] and [current_phase(thirds, i, 3) for i in range(3)] == [0, 1, 2]
    for wrong in ("128", "128:", "a:1", "1.5:1", "128:1:1"):
        with pytest.raises(ValueError, match=f"as in 128:0.9, got '{wrong}'"):
            parse_phases([wrong])
    for wrong in (["8:0.5", "16:0.6"], ["8:1.5", "16:-0.5"], ["8:nan"], []):
        with pytest.raises(ValueError, match="shares must be above 0, and 1 together"):
            parse_phases(wrong)


@pytest.mark.parametrize(("static", "resumed_at"), [(False, [8, 20]), (True, [20])])
def test_a_run_of_two_phases_resumes_in_either_bit_for_bit(settings, tmp_path, monkeypatch, static, resumed_at):
    """Batches hold as many tokens in both, of sequences as long as the phase says; scores name their length."""
    config = dataclasses.replace(
        settings, output=tmp_path / "whole", phases=("32:0.75", "64:0.25"), seq_len=128, steps=24, snapshot_every=4,
        keep=9, static_shapes=static,
    )  # fmt: skip
    seen, train_step = [], step.train_step
    monkeypatch.setattr(
        step, "train_step", lambda *given, **named: seen.append(given[2][0]) or train_step(*given, **named)
    )
    pretrain(config)
    assert snapshot.steps(config.output / "snapshots") == [4, 8, 12, 16, 20, 24]
    lengths = [int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max()) for batch in seen]
    assert max(lengths[:18]) == 32 and max(lengths[18:]) == 64
    assert all(450 < batch.filled_tokens <= 512 for batch in seen)
    if static:
        shapes = {(len(b.input_ids), len(b.cu_seqlens), len(b.labels), b.max_seqlen) for b in seen}
        assert {shape[3] for shape in shapes} == {32, 64} and len(shapes) == 2, "one shape a phase"
    records = read_metrics(config.output / "metrics.jsonl")
    assert {r["step"]: r["held_out/seq_len"] for r in records if "held_out/mlm_loss" in r} == {12: 32, 24: 64}
    for at in resumed_at:
        run = tmp_path / f"from {at}"
        shutil.copytree(config.output, run)
        for later in range(at + 4, 28, 4):
            shutil.rmtree(run / f"snapshots/step-{later:08d}")
        shutil.rmtree(run / "model")
        pretrain(runs.read_config(run), resume=True)
        assert_same_run(run, config.output)


def test_each_phase_has_a_captured_step_of_its_own(settings, tmp_path, monkeypatch):
    """As on a GPU, with a stand-in that captures nothing and, like a graph, takes batches of one shape alone."""
    made = []

    def stand_in(taken, example, warmup, device):
        layout = Layout(example)
        made.append(example[0][0].max_seqlen)

        def call(inputs):
            layout.tensors_of(inputs)
            return taken(inputs)

        return call

    config = dataclasses.replace(
        settings, output=tmp_path / "whole", phases=("32:0.5", "64:0.5"), seq_len=128, steps=8, static_shapes=True
    )
    pretrain(config)
    monkeypatch.setattr(step, "on_gpu", lambda config: True)
    monkeypatch.setattr(step, "capture", stand_in)
    captured = dataclasses.replace(config, output=tmp_path / "captured")
    pretrain(captured)
    assert made == [32, 64]
    assert_same_run(captured.output, config.output)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["128:0.9", "1024:0.1"], "phases must be at most the rows of the position table, max_position_embeddings="),
        (["128:0.9", "512:0.2"], "the phases' shares must be above 0, and 1 together, got 128:0.9 512:0.2: 1.1"),
        (["4:0.5", "128:0.5"], "phases must be of lengths from 8 to 65536, got 4"),
        (["128:0.9", "512:0.1", "--batch-tokens", "500"], "batch_tokens must be at least one sample's, of 512 tokens"),
        (["128:0.99", "512:0.01"], "phases must be of a step each or more, of steps=20, got '128:0.99 512:0.01'"),
        (["128:0.9", "512:0.1", "--seq-len", "64"], "seq_len must be left out with phases, got 64"),
    ],
)
def test_phases_that_cannot_be_are_refused_before_anything_is_written(
    settings, tmp_path, capsys, monkeypatch, given, said
):
    out = tmp_path / "new"
    arguments = "pretrain", "--output", out, "--corpus", settings.corpus, "--steps", 20, "--phases", *given
    assert said in bad(capsys, monkeypatch, *arguments) and not out.exists()
