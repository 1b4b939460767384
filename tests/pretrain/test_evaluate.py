import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from fastbert.data.batch import Batch
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.pretrain.evaluate import Frequencies, evaluate, forward, guesses
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.step import make_optimizer, train_step


def test_frequencies_by_hand():
    # With one added to each: 1, 7, 91, 1 of 100.
    frequencies = Frequencies(torch.tensor([0, 6, 90, 0]))
    assert frequencies.log_probability.exp().tolist() == pytest.approx([0.01, 0.07, 0.91, 0.01])
    # The rarest that together make up a tenth of 96: 0, 0 and 6, not 90.
    assert frequencies.rare.tolist() == [True, True, False, True]


def make_batch(lengths, masked_each=2, nsp=True):
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    starts = torch.cat([torch.arange(n) for n in lengths])
    places = (bounds[:-1].long()[:, None] + 1 + torch.arange(masked_each)).flatten()
    return Batch(
        input_ids=torch.randint(5, 50, (total,), generator=generator),
        token_type_ids=torch.zeros(total, dtype=torch.int64),
        position_ids=starts,
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        masked_positions=places,
        labels=torch.randint(5, 50, places.shape, generator=generator),
        sentence_label=torch.arange(len(lengths)) % 2 if nsp else None,
        filled_tokens=total,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig.preset("tiny", vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForPreTraining(config)


@pytest.mark.parametrize("lengths", [[5, 9], [40, 24], [64] * 8, [3] * 9])
@pytest.mark.parametrize("nsp", [True, False])
def test_rounding_up_a_batch_changes_no_loss_and_no_gradient(model, lengths, nsp):
    batch = make_batch(lengths, nsp=nsp)
    filled = batch.filled(pad_id=0)
    assert len(filled.input_ids) % 64 == len(filled.labels) % 32 == (len(filled.cu_seqlens) - 1) % 8 == 0
    assert torch.equal(filled.input_ids[: sum(lengths)], batch.input_ids)
    assert filled.cu_seqlens[: len(lengths) + 1].tolist() == batch.cu_seqlens.tolist()

    def outcome(batch):
        model.zero_grad()
        out = model(
            batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, masked_positions=batch.masked_positions,
            labels=batch.labels, next_sentence_label=batch.sentence_label,
        )  # fmt: skip
        out.loss.backward()
        return out, [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    (plain, gradients), (rounded, others) = outcome(batch), outcome(filled)
    torch.testing.assert_close(rounded.loss, plain.loss)
    torch.testing.assert_close(rounded.prediction_logits[: len(batch.labels)], plain.prediction_logits)
    for ours, theirs in zip(others, gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 31, 40])
def test_a_short_position_table_takes_the_padding_in_pieces(rows):
    """13 tokens and 51 of padding, in samples of at most `rows`; loss and logits are those of the batch itself."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=50, max_position_embeddings=rows)).eval()
    batch = make_batch([8, 5])
    filled = batch.filled(pad_id=0, longest=rows)
    lengths = filled.cu_seqlens.diff().tolist()
    pieces = [rows] * (51 // rows) + [51 % rows]
    assert lengths == [8, 5, *pieces] + [0] * (-(2 + len(pieces)) % 8)
    assert filled.position_ids[13:].tolist() == [i for n in pieces for i in range(n)]
    plain = model(
        batch.input_ids, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens,
        masked_positions=batch.masked_positions, labels=batch.labels, next_sentence_label=batch.sentence_label,
    )  # fmt: skip
    rounded = forward(model, batch)
    torch.testing.assert_close(rounded.loss, plain.loss)
    torch.testing.assert_close(rounded.prediction_logits[: len(batch.labels)], plain.prediction_logits)


def test_scores_are_means_over_masked_tokens(model):
    batches = [make_batch([7, 12]), make_batch([30])]
    frequencies = Frequencies(torch.arange(50))
    scores = evaluate(model, batches, 2, frequencies, "cpu")
    losses, ids = [], []
    for batch in batches:
        logits = forward(model, batch).prediction_logits[: len(batch.labels)]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none"))
        ids.append(batch.labels)
    losses, ids = torch.cat(losses), torch.cat(ids)
    assert scores["mlm_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert scores["frequency_loss"] == pytest.approx(-frequencies.log_probability[ids].mean().item())
    rare = frequencies.rare[ids]
    expected = losses[rare].mean().item()
    assert math.isnan(expected) or scores["rare_mlm_loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 <= scores["nsp_accuracy"] <= 1
    assert evaluate(model, batches, 1, frequencies, "cpu")["mlm_loss"] != scores["mlm_loss"]


def test_scores_over_nothing_are_not_a_number(model):
    frequencies = Frequencies(torch.zeros(50, dtype=torch.int64))
    for batches in ([], [make_batch([7, 12], masked_each=0, nsp=False)]):
        scores = evaluate(model, batches, 4, frequencies, "cpu")
        assert len(scores) == 6 and all(math.isnan(value) for value in scores.values())
    scores = evaluate(model, [make_batch([7, 12], masked_each=0)], 1, frequencies, "cpu")
    assert math.isnan(scores["mlm_loss"]) and scores["nsp_loss"] > 0


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("rows", ["all", "touched"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_with_nothing_to_predict(model, nsp, rows, bf16):
    config = PretrainConfig(
        output=Path("run"), steps=9, lr=1e-3, objective="mlm+nsp" if nsp else "mlm", embedding_update=rows, bf16=bf16
    )
    optimizer = make_optimizer(model, config)
    empty, usual = make_batch([7, 12], masked_each=0, nsp=nsp), make_batch([7, 12], nsp=nsp)
    record = train_step(model, optimizer, [empty, empty], 1e-3, config)
    assert record["mlm_loss"].item() == 0.0
    assert record["loss"].item() == (record["nsp_loss"].item() if nsp else 0.0)
    assert (record["gradient_norm"].item() > 0) == nsp
    # Beside a micro-batch that has words to predict it changes nothing of theirs.
    expected = forward(model, usual).mlm_loss.item()
    record = train_step(model, optimizer, [empty, usual], 1e-3, config)
    assert record["mlm_loss"].item() == pytest.approx(expected, rel=2e-2 if bf16 else 1e-5)
    assert all(param.isfinite().all() for param in model.parameters())


def fill_mask(words, sentence, masked):
    """What `guesses` prints for one sequence of these words, the one at `masked` being masked."""
    special = ["<pad>", "[UNK]", "[CLS]", "[SEP]", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    ids = torch.tensor([2, *(vocab[word] for word in sentence), 3])
    labels = ids[[masked + 1]]
    ids[masked + 1] = vocab["<mask>"]
    zeros, bounds = torch.zeros(len(ids), dtype=torch.int64), torch.tensor([0, len(ids)], dtype=torch.int32)
    masked_positions = torch.tensor([masked + 1])
    batch = Batch(ids, zeros, torch.arange(len(ids)), bounds, len(ids), masked_positions, labels, None, len(ids))
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=len(vocab)))
    with torch.no_grad():
        model.cls["predictions"].bias.copy_(torch.arange(len(vocab)) * 30.0)  # sure of the last word
    return guesses(model, [batch], tokenizer, "cpu").splitlines()[2:]


@pytest.mark.parametrize(
    ("sentence", "masked", "shown"),
    [
        (["the", "film", "was", "good"], 1, "... the [film] was good ..."),
        (["我", "爱", "北", "京", "，", "bert", "好"], 1, "... 我 [爱] 北京， bert 好 ..."),
        (["한국", "##어", "한국"], 2, "... 한국어 [한국]  ..."),
        (
            ["an", "##y"] + ["word"] * 14 + ["the", "##re"],
            2,
            "... any [word] word word word word word word word word word ...",
        ),
        (
            ["an", "##y"] + ["word"] * 14,
            14,
            "... any word word word word word word word word word word word word [word] word ...",
        ),
        (["हिन्दी", "है"], 0, "...  [हिन्दी] है ..."),
    ],
)
def test_guesses_show_words_of_every_script(sentence, masked, shown):
    lines = fill_mask([*dict.fromkeys(sentence), "surely"], sentence, masked)
    assert lines[0].strip() == shown and lines[1].strip().startswith("surely 100%")


@pytest.mark.parametrize(("sentence", "masked"), [(["was"], 0), (["한국", "##어"], 0), (["1999"], 0), (["——"], 0)])
def test_guesses_without_a_whole_word_say_so(sentence, masked):
    assert fill_mask([*sentence, "surely"], sentence, masked) == ["  none: no whole word of it is masked"]
