"""`fastbert finetune --features`: a head over a frozen BERT's or ELMo's layers, resumed, saved and predicted by."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from finetune_tables import make_encoder, read, rows, write

pytest.importorskip("sklearn")

from fastbert import AutoModel, ElmoConfig, ElmoModel
from fastbert.data import load_tokenizer
from fastbert.finetune import FinetuneConfig, PredictConfig, finetune, predict, training
from fastbert.models.features import FeatureClassifier


@pytest.fixture(scope="module", params=["bert", "albert", "elmo"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param != "elmo":
        return make_encoder(request.param, path)
    tokenizer = load_tokenizer(make_encoder("bert", tmp_path_factory.mktemp("tokenizer")))
    torch.manual_seed(0)
    ElmoModel(ElmoConfig(tokenizer.get_vocab_size(), 24, None, 2, 32)).save_pretrained(path, tokenizer)
    return path


def test_a_head_over_features_learns_resumes_and_predicts_by_its_definition(folder, tmp_path, monkeypatch):
    tables = write(tmp_path / "train.csv", rows(96)), write(tmp_path / "new.csv", rows(24, seed=1))
    config = FinetuneConfig(
        folder, tables[0], tmp_path / "out", evaluate=tables[1], features=True, epochs=20, patience=20, batch_size=16,
        lr=5e-2,
    )  # fmt: skip
    made = finetune(config)
    stored = json.loads((tmp_path / "out/scores.json").read_text())
    assert stored["epochs"][stored["best_epoch"] - 1]["accuracy"] >= 0.6, "by chance a third"

    predict(PredictConfig(made, tables[1], text="text", output=tmp_path / "new.jsonl", batch_tokens=60))
    ours = [json.loads(line)["probabilities"] for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    model, encoder = FeatureClassifier.from_pretrained(made), AutoModel.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    kept = model.encoder.state_dict()
    assert all(torch.equal(x, kept[name]) for name, x in encoder.state_dict().items() if name in kept), "frozen"
    weights = model.mix.scores.double().softmax(0) * model.mix.gamma.double()
    with torch.no_grad():
        for row, found in zip(read(tables[1])[:5], ours, strict=False):
            ids = torch.tensor(tokenizer.encode(row["text"]).ids)
            packed = {"input_ids": ids, "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32)}
            states = layers_of(encoder, packed)
            mixed = sum(weight * state.double().mean(0) for weight, state in zip(weights, states, strict=True))
            logits = model.classifier.weight.double() @ mixed + model.classifier.bias.double()
            np.testing.assert_allclose(list(found.values()), logits.softmax(0), rtol=0, atol=1e-5)

    class Stopped(Exception):
        pass

    steps = training.FeatureTrainer._take_step

    def stops(self, places):
        if self.step == 9:
            raise Stopped
        return steps(self, places)

    broken = dataclasses.replace(config, output=tmp_path / "broken")
    monkeypatch.setattr(training.FeatureTrainer, "_take_step", stops)
    with pytest.raises(Stopped):
        finetune(broken)
    monkeypatch.undo()
    again = FeatureClassifier.from_pretrained(finetune(broken, resume=True)).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items()), "bit for bit"


def layers_of(encoder, packed):
    """Every layer's output by itself: of an encoder, what the model would be with fewer layers."""
    if isinstance(encoder, ElmoModel):
        return encoder(**packed).hidden_states
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in set(encoder.layers())]
    last = encoder(**packed).sequence_output
    for hook in hooks:
        hook.remove()
    return [*seen, last]


def test_a_regression_over_features_and_refusals(tmp_path):
    bert = make_encoder("bert", tmp_path / "bert")
    table = write(tmp_path / "train.csv", rows(96))
    config = FinetuneConfig(
        bert, table, tmp_path / "out", features=True, label="number", regression=True, epochs=20, metric="rmse", lr=3e-2
    )
    model = FeatureClassifier.from_pretrained(finetune(config))
    assert model.labels == ("number",) and "transformers has no such model" in model.loaded_by
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="fastbert-features"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out/model")
    ElmoModel(ElmoConfig(40, 8, None)).save_pretrained(tmp_path / "elmo")
    with pytest.raises(ValueError, match=r"holds an ELMo, .* fastbert finetune --features trains a classifier"):
        finetune(FinetuneConfig(tmp_path / "elmo", table, tmp_path / "other"))
