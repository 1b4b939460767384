"""What one step does: its loss, its rows, and that it stops where numbers are no longer finite."""

import dataclasses

import pytest
import torch
from pretrain_runs import bad, losses
from torch._dynamo.testing import CompileCounter

from fastbert.data.batches import PretrainBatches
from fastbert.data.shards import open_stores
from fastbert.data.tokenizer import load_tokenizer, special_ids
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain import snapshot, step, training
from fastbert.pretrain.loop import pretrain


def small(config, **overrides):
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=1000, hidden_dropout_prob=0.0, **overrides))
    return model, step.make_optimizer(model, config)


def batches(finished, config, static=False):
    special = special_ids(load_tokenizer(finished / "tokenizer"))
    store = open_stores(finished / "data")[0]
    return PretrainBatches(store, special, seq_len=32, batch_tokens=config.batch_tokens, seed=0, static=static)


def test_accumulated_is_one_large_batch(settings, finished):
    """Gradients over two micro-batches are those of the mean over all their masked tokens and pairs."""
    config = dataclasses.replace(settings, steps=10, clip=1e9, embedding_update="all", objective="mlm+nsp")
    micro = [batches(finished, config)[i] for i in (0, 1)]
    model, optimizer = small(config, attention_probs_dropout_prob=0.0)
    optimizer.step = optimizer.zero_grad = lambda **_: None
    record = step.train_step(model, optimizer, micro, 0.0, config)
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
    step.train_step(model, optimizer, micro, 1e-3, config)
    touched = torch.zeros(len(words), dtype=torch.bool)
    for batch in micro:
        touched[batch.input_ids] = touched[batch.labels] = True
    assert 0 < touched.sum() < len(words)
    moved = (words != before).any(1)
    assert not moved[~touched].any() and moved[touched].all()

    all_rows = dataclasses.replace(config, embedding_update="all")
    model, optimizer = small(all_rows)
    step.train_step(model, optimizer, micro, 1e-3, all_rows)
    assert (model.bert.embeddings.word_embeddings.weight != before).any(1).float().mean() > 0.99


def without_padding(batch):
    """A static batch's samples alone."""
    count, sequences = int((batch.labels >= 0).sum()), int((batch.sentence_label >= 0).sum())
    tokens = {"input_ids", "token_type_ids", "position_ids"}
    lengths = dict.fromkeys(tokens, batch.filled_tokens) | dict.fromkeys(("masked_positions", "labels"), count)
    lengths |= {"cu_seqlens": sequences + 1, "sentence_label": sequences}
    return batch._replace(**{name: getattr(batch, name)[:length] for name, length in lengths.items()})


@pytest.mark.parametrize("rows", ["all", "touched"])
def test_a_step_of_static_batches_is_that_of_their_samples(settings, finished, rows):
    """Losses, gradient norm and every weight, where micro-batches hold unequally much: the last is mostly padding."""
    config = dataclasses.replace(settings, steps=10, objective="mlm+nsp", embedding_update=rows)
    static = batches(finished, config, static=True)
    micro = [static[0], static[len(static) - 1]]
    assert micro[1].filled_tokens < static.shape.tokens / 2
    outcomes = []
    for each, its in ((micro, True), ([without_padding(batch) for batch in micro], False)):
        model, optimizer = small(config, attention_probs_dropout_prob=0.0)
        record = step.train_step(model, optimizer, each, 1e-4, dataclasses.replace(config, static_shapes=its))
        numbers = torch.tensor([float(record[name]) for name in ("loss", "mlm_loss", "nsp_loss", "gradient_norm")])
        outcomes.append([numbers, *model.parameters()])
    # Adam divides by the gradient's own size, so that a rounding error of a tiny gradient is one of the step.
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=0)
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    untouched = (outcomes[0][1] == small(config)[0].word_embeddings).all(1)
    assert untouched[0] == (rows == "touched"), "[PAD] stands in no text"


def test_counts_of_static_batches_never_wait_for_the_device(settings, finished):
    """On meta tensors, which have no values, whatever needs one raises."""
    static = batches(finished, settings, static=True)
    micro = [static[i].to("meta").filled(0) for i in (0, 1)]
    assert [share.shape for share in step.shares([batch.labels for batch in micro], True)] == [(), ()]
    tokens, _, masked = static.shape
    assert step.words_of(micro, 0, True).shape == (2 * (tokens + masked),), "T and M are multiples of 64 and 32 already"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_a_model_compiles_once_for_static_batches(settings, finished):
    torch.compiler.reset()
    config = dataclasses.replace(settings, objective="mlm+nsp")
    static, (model, _) = batches(finished, config, static=True), small(config)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for i in (0, 1, len(static) - 1):
        batch = static[i]
        out = compiled(
            batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, masked_positions=batch.masked_positions,
            labels=batch.labels, next_sentence_label=batch.sentence_label,
        )  # fmt: skip
        assert out.loss.isfinite()
    assert counter.frame_count == 1


def test_a_run_that_diverges_stops_and_keeps_its_snapshots(settings, finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(settings, output=tmp_path / "diverged", snapshot_every=5, keep=1)
    monkeypatch.setattr(training, "learning_rate", lambda step, *_, **__: 1e-3 if step < 11 else 1e30)
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
