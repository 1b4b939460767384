"""What a run says of its arithmetic, its padding, its waiting and its accuracy on the training text."""

import dataclasses
import math
import types

import pytest
import torch
from pretrain_runs import losses

from fastbert.data.batch import Batch, Shape
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain import meter, step
from fastbert.pretrain.accuracy import as_numbers, named_hits
from fastbert.pretrain.evaluate import forward
from fastbert.pretrain.presets import operations
from fastbert.pretrain.report import read_metrics


def batch_of(*lengths, labels, sentence_label=None):
    tokens = sum(lengths)
    return Batch(
        input_ids=torch.arange(5, 5 + tokens), token_type_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max_seqlen=max(lengths),
        masked_positions=torch.arange(len(labels)), labels=torch.tensor(labels),
        sentence_label=None if sentence_label is None else torch.tensor(sentence_label), filled_tokens=tokens,
    )  # fmt: skip


def test_the_work_of_a_batch_leaves_padding_out():
    config = BertConfig.preset("tiny", vocab_size=100)
    batch = batch_of(3, 5, labels=[7, 8, 9])
    for each in (batch, batch.padded(0, Shape(64, 16, 32), 20)):
        assert meter.work(each, config) == operations(config, 8, 3 * 3 + 5 * 5, 3, 2)
        causal = dataclasses.replace(config, is_decoder=True)
        assert meter.work(each, causal) == operations(config, 8, 6 + 15, 3, 2), "a token sees those before it"


def test_shares_by_hand(settings, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.setattr(meter, "product_rate", lambda config: 1e6)
    config = BertConfig.preset("tiny", vocab_size=100)
    measured = meter.Meter(settings, config)
    batch = batch_of(20, 30, labels=[7])
    for waited in (1.0, 2.0):
        with measured.waiting():
            clock.now += waited
        measured.count([batch, batch])
        clock.now += 3.5
    work = operations(config, 50, 20 * 20 + 30 * 30, 1, 2)
    shares = {"tokens_per_second": 20, "padding": 1 - 50 / 64, "waiting": 0.3, "mfu": 4 * work / 10.0 / 1e6}
    assert measured.used(200) == pytest.approx(shares, abs=1e-4)
    measured.start(200)
    clock.now += 1.0
    measured.count([batch.padded(0, Shape(100, 8, 32), 30)])
    used = measured.used(250)
    assert used["tokens_per_second"] == 50 and used["padding"] == pytest.approx(1 - 50 / 128, abs=1e-4)
    assert used["waiting"] == 0.0


def test_the_rate_is_that_of_the_fastest_product_and_draws_no_random_number(settings, monkeypatch):
    seconds = iter([0.0, 5.0, 10.0, 12.0, 20.0, 24.0])  # three products: the library's first one is not timed
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(meter, "SIDE", {"cpu": 64})
    kinds, linear = [], meter.linear
    monkeypatch.setattr(meter, "linear", lambda x, weight: kinds.append(linear(x, weight).dtype))
    state = torch.get_rng_state()
    assert meter.product_rate(dataclasses.replace(settings, bf16=True, linear="torch")) == 2 * 64**3 / 2.0
    assert kinds == [torch.bfloat16] * 4 and torch.equal(torch.get_rng_state(), state)


def test_accuracy_by_hand():
    both = {"lr": 0.5, **named_hits([torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])], "sop")}
    assert as_numbers(both | {"loss": torch.tensor(2.0)}) == {
        "lr": 0.5, "mlm_accuracy": 0.6, "sop_accuracy": 0.5, "loss": 2.0
    }  # fmt: skip
    none = as_numbers(named_hits([torch.tensor([0.0, 0.0])], ""))
    assert list(none) == ["mlm_accuracy"] and math.isnan(none["mlm_accuracy"])


def test_right_predictions_of_a_step_are_those_of_its_logits(settings):
    """Over micro-batches, one of which has labels that do not count."""
    config = dataclasses.replace(settings, objective="mlm+nsp", linear="torch")
    torch.manual_seed(0)
    model = BertForPreTraining(
        BertConfig.preset("tiny", vocab_size=100, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    kinds = [([7, 8, 9], [0, 1]), ([7, 8, -100], [1, -100])]
    micro = [batch_of(4, 4, labels=labels, sentence_label=pairs) for labels, pairs in kinds]
    for batch in micro:  # the first label of words and of pairs becomes what the model says, the second something else
        out = forward(model.eval(), batch)
        for logits, labels in ((out.prediction_logits, batch.labels), (out.sentence_logits, batch.sentence_label)):
            labels[0] = logits[0].argmax()
            if labels[1] != -100:
                labels[1] = logits[1].argmin()
    assert (micro[0].labels[2] == 9) and (forward(model, micro[0]).prediction_logits[2].argmax() != 9)
    record = step.train_step(model, step.make_optimizer(model, config), micro, 0.0, config, number=config.log_every)
    assert record["mlm_hits"].tolist() == [2, 5] and record["nsp_hits"].tolist() == [2, 3]


def test_a_run_logs_them_where_it_logs(settings, finished):
    records = [r for r in read_metrics(finished / "metrics.jsonl") if "loss" in r]
    assert len(records) == 40
    names = {"lr", "gradient_norm", "mlm_accuracy", "nsp_accuracy", "tokens_per_second", "padding", "waiting", "mfu"}
    for record in records:
        assert names <= record.keys() and all(record[name] >= 0 for name in names)
        assert record["padding"] < 64 / 450 and record["waiting"] < 1
        assert record["mlm_accuracy"] <= 1 and record["nsp_accuracy"] <= 1
    assert losses(finished).keys() == {record["step"] for record in records}

    config = dataclasses.replace(settings, log_every=3, objective="mlm+nsp", linear="torch")
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=100))
    micro = [batch_of(4, 4, labels=[7, 8], sentence_label=[0, 1])]
    for number, logged in ((1, False), (2, False), (3, True), (torch.tensor(4.0), True)):
        record = step.train_step(model, step.make_optimizer(model, config), micro, 0.0, config, None, number)
        assert ("mlm_hits" in record) == ("nsp_hits" in record) == logged
