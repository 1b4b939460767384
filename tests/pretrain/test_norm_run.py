"""A run with a norm that keeps running statistics: snapshots have them, and so does the model at its end."""

import dataclasses
import json
import shutil

import pytest
import torch
from finetune_tables import rows, write
from pretrain_runs import assert_same_run

from fastbert.finetune import FinetuneConfig, finetune
from fastbert.models.auto import AutoModel
from fastbert.models.classification import BertForSequenceClassification
from fastbert.pretrain.loop import pretrain


def test_running_statistics_are_resumed_exported_and_gone_on_from(settings, tmp_path, capsys):
    config = dataclasses.replace(
        settings, output=tmp_path / "whole", norm="switchable", static_shapes=True, steps=14, objective="mlm"
    )
    folder = pretrain(config)
    assert "(fastbert loads it; transformers cannot, as it has no switchable norm)" in capsys.readouterr().out
    encoder = AutoModel.from_pretrained(folder)
    end = encoder.encoder["layer"][1].output.norm
    assert (end.running_mean.abs() > 1e-3).any() and (end.mean_weight != 1).all()

    broken = dataclasses.replace(config, output=tmp_path / "broken")
    shutil.copytree(config.output, broken.output)
    shutil.rmtree(broken.output / "snapshots/step-00000014")
    shutil.rmtree(broken.output / "model")
    pretrain(broken, resume=True)
    assert_same_run(broken.output, config.output)

    again = dataclasses.replace(
        settings, output=tmp_path / "again", init=folder, vocab_size=8192, norm="layer", steps=1, objective="mlm"
    )
    assert AutoModel.from_pretrained(pretrain(again)).config == encoder.config
    assert json.loads((again.output / "config.json").read_text())["norm"] == "switchable"
    again = dataclasses.replace(again, output=tmp_path / "other", norm="batch")
    with pytest.raises(ValueError, match="decides --norm: leave that out"):
        pretrain(again)

    table = write(tmp_path / "train.csv", rows(40))
    tuned = finetune(FinetuneConfig(folder, table, tmp_path / "tuned", epochs=1))
    classifier = BertForSequenceClassification.from_pretrained(tuned)
    assert classifier.config.norm == "switchable"
    moved = classifier.base_model.encoder["layer"][1].output.norm.running_mean
    assert moved.isfinite().all() and not torch.equal(moved, end.running_mean)


def test_settings_that_do_not_go_with_a_norm_are_refused(settings):
    refused = [
        ({"norm": "rms"}, "norm must be one of layer, batch, instance, group, switchable, got 'rms'"),
        ({"norm": "instance", "objective": "clm"}, "norm must be layer or group with objective clm"),
        ({"norm": "batch", "model": "albert"}, "norm must be layer, instance or group for albert"),
        ({"norm": "batch", "checkpoint_layers": True}, "checkpoint_layers must be left out with norm batch"),
        ({"norm": "switchable", "shard": True}, "shard must be left out with norm switchable"),
    ]
    for changed, said in refused:
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(settings, **changed).check()
