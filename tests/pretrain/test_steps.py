"""What one step does: its loss, its rows, and that it stops where numbers are no longer finite."""

import dataclasses

import pytest
import torch
from pretrain_runs import bad, losses

from fastbert.data.batches import PretrainBatches
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import load_tokenizer, special_ids
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain import loop, snapshot
from fastbert.pretrain.loop import pretrain


def small(config, **overrides):
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=1000, hidden_dropout_prob=0.0, **overrides))
    return model, loop.make_optimizer(model, config)


def batches(finished, config):
    special = special_ids(load_tokenizer(finished / "tokenizer"))
    store = TokenStore.open(finished / "data/train")
    return PretrainBatches(store, special, seq_len=32, batch_tokens=config.batch_tokens, seed=0)


def test_accumulated_is_one_large_batch(settings, finished):
    """Gradients over two micro-batches are those of the mean over all their masked tokens and pairs."""
    config = dataclasses.replace(settings, steps=10, clip=1e9, embedding_update="all", objective="mlm+nsp")
    micro = [batches(finished, config)[i] for i in (0, 1)]
    model, optimizer = small(config, attention_probs_dropout_prob=0.0)
    optimizer.step = optimizer.zero_grad = lambda **_: None
    record = loop.train_step(model, optimizer, micro, 0.0, config)
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    outputs = [
        model(
            b.input_ids, token_type_ids=b.token_type_ids, cu_seqlens=b.cu_seqlens, max_seqlen=b.max_seqlen,
            masked_positions=b.masked_positions,
        )
        for b in micro
    ]  # fmt: skip
    words = torch.nn.functional.cross_entropy(
        torch.cat([o.prediction_logits for o in outputs]), torch.cat([b.labels for b in micro])
    )
    pairs = torch.nn.functional.cross_entropy(
        torch.cat([o.seq_relationship_logits for o in outputs]), torch.cat([b.sentence_label for b in micro])
    )
    (words + pairs).backward()
    assert record["loss"].item() == pytest.approx((words + pairs).item(), rel=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_touched_moves_the_words_of_the_step_and_no_other(settings, finished):
    config = dataclasses.replace(settings, steps=10, embedding_update="touched", objective="mlm+nsp")
    micro = [batches(finished, config)[i] for i in (0, 1)]
    model, optimizer = small(config)
    words = model.bert.embeddings.word_embeddings.weight
    before = words.detach().clone()
    loop.train_step(model, optimizer, micro, 1e-3, config)
    touched = torch.zeros(len(words), dtype=torch.bool)
    for batch in micro:
        touched[batch.input_ids] = touched[batch.labels] = True
    assert 0 < touched.sum() < len(words)
    moved = (words != before).any(1)
    assert not moved[~touched].any() and moved[touched].all()

    all_rows = dataclasses.replace(config, embedding_update="all")
    model, optimizer = small(all_rows)
    loop.train_step(model, optimizer, micro, 1e-3, all_rows)
    assert (model.bert.embeddings.word_embeddings.weight != before).any(1).float().mean() > 0.99


def test_a_run_that_diverges_stops_and_keeps_its_snapshots(settings, finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(settings, output=tmp_path / "diverged", snapshot_every=5, keep=1)
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 1e-3 if step < 11 else 1e30)
    with pytest.raises(ValueError, match=r"diverged at step 1[34] of 40: its loss .* the snapshot of step 10 is kept"):
        pretrain(config)
    assert snapshot.steps(config.output / "snapshots") == [10]
    assert max(losses(config.output)) <= 13 and not (config.output / "model").exists()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "diverged at step" in text and "lower --lr (now 0.003)" in text

    # weights that are finite and good for nothing: the held-out scores tell, before a snapshot and the export
    last = dataclasses.replace(config, output=tmp_path / "last", steps=12)
    with pytest.raises(ValueError, match=r"diverged at step 12 of 12: .* the snapshot of step 10 is kept"):
        pretrain(last)
    assert not (last.output / "model").exists()
