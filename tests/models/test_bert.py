"""BERT: padded and packed forms, losses, compile, training beside a plain PyTorch BERT."""

import functools

import pytest
import torch
from bert_batches import LENGTHS, SMALL, B, S, V, batch, encoder_inputs, packed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fastbert
from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.layers import LinearGELU
from fastbert.models.parameter_names import BERT, to_hugging_face
from fastbert.testing import assert_close

BACKENDS = [name for name in fastbert.backends() if name != "triton"]  # which takes no tensors here, or interprets


# --- forms of input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_packed_and_single_sequences_agree(backend):
    model, inputs = BertModel(SMALL).eval(), encoder_inputs(batch())
    with fastbert.use_backend(backend), torch.no_grad():
        padded, ragged = model(**inputs), model(**encoder_inputs(packed(batch())))
        torch.testing.assert_close(padded.sequence_output[inputs["attention_mask"].bool()], ragged.sequence_output)
        torch.testing.assert_close(padded.pooled_output, ragged.pooled_output)
        for row, length in enumerate(LENGTHS):
            single = model(inputs["input_ids"][row : row + 1, :length],
                           token_type_ids=inputs["token_type_ids"][row : row + 1, :length])  # fmt: skip
            torch.testing.assert_close(padded.sequence_output[row, :length], single.sequence_output[0])
            torch.testing.assert_close(padded.pooled_output[row], single.pooled_output[0])
    assert padded.sequence_output[inputs["attention_mask"] == 0].abs().max() == 0
    assert padded.last_hidden_state is padded.sequence_output and padded.pooler_output is padded.pooled_output


def test_defaults_are_type_zero_counted_positions_and_no_padding():
    model, ids = BertModel(SMALL).eval(), batch()["input_ids"]
    explicit = model(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.arange(S).expand_as(ids))
    for ours, theirs in zip(model(ids), explicit, strict=True):
        torch.testing.assert_close(ours, theirs)
    shifted = model(ids, position_ids=torch.arange(S)[None] + 1)
    assert not torch.allclose(shifted.sequence_output, explicit.sequence_output, atol=1e-3)


def test_max_seqlen_is_found_where_it_is_not_given():
    model, inputs = BertModel(SMALL).eval(), encoder_inputs(packed(batch()))
    found = model(**(inputs | {"max_seqlen": None}))
    assert torch.equal(found.sequence_output, model(**inputs).sequence_output)


def test_padding_may_stand_anywhere():
    """Padding in front moves a sequence to other places; with its positions given it is computed the same."""
    model, ids = BertModel(SMALL).eval(), torch.tensor([[5, 6, 7]])
    right = model(F.pad(ids, (0, 2)), torch.tensor([[1, 1, 1, 0, 0]]))
    left = model(F.pad(ids, (2, 0)), torch.tensor([[0, 0, 1, 1, 1]]), position_ids=torch.tensor([[0, 0, 0, 1, 2]]))
    torch.testing.assert_close(left.sequence_output[:, 2:], right.sequence_output[:, :3])
    torch.testing.assert_close(left.pooled_output, right.pooled_output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[5, 0, 3], [4, 0], [0, 0]])
def test_a_fully_padded_sequence_is_harmless(backend, lengths):
    model, inputs = BertForPreTraining(SMALL), batch(lengths=lengths)
    with fastbert.use_backend(backend):
        out = model(**inputs)
        out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    empty = torch.tensor(lengths) == 0
    encoder = model.bert
    torch.testing.assert_close(
        encoder(**encoder_inputs(inputs)).pooled_output[empty],
        torch.tanh(encoder.pooler["dense"].bias).expand(int(empty.sum()), -1),
    )


def test_evaluation_is_deterministic_and_training_is_not():
    model, inputs = BertForPreTraining(SMALL), batch()
    assert not torch.equal(model(**inputs).loss, model(**inputs).loss)
    model.eval()
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_means_over_labels_that_count():
    model, inputs = BertForPreTraining(SMALL).eval(), batch()
    out = model(**inputs)
    every = model(**{k: v for k, v in inputs.items() if k != "labels"})
    assert every.prediction_logits.shape == (B, S, V) and every.mlm_loss is None
    expected = F.cross_entropy(every.prediction_logits.view(-1, V), inputs["labels"].view(-1))
    torch.testing.assert_close(out.mlm_loss, expected)
    torch.testing.assert_close(
        out.nsp_loss, F.cross_entropy(out.seq_relationship_logits, inputs["next_sentence_label"])
    )
    torch.testing.assert_close(out.loss, out.mlm_loss + out.nsp_loss)
    torch.testing.assert_close(out.prediction_logits, every.prediction_logits[inputs["labels"] != -100])


def test_every_form_of_labels_gives_the_same_losses():
    model, padded = BertForPreTraining(SMALL).eval(), batch()
    ragged = packed(padded)
    everywhere = padded["labels"][padded["attention_mask"].bool()]
    positions = (padded["labels"].flatten() != -100).nonzero().squeeze(1)
    flat = {"masked_positions": positions, "labels": padded["labels"].flatten()[positions]}
    # A fixed number of positions, the last ones unused.
    filled = {"masked_positions": F.pad(positions, (0, 3)), "labels": F.pad(flat["labels"], (0, 3), value=-100)}
    expected = model(**padded)
    for inputs in (ragged, ragged | {"labels": everywhere, "masked_positions": None}, padded | flat, padded | filled):
        out = model(**inputs)
        torch.testing.assert_close(out.mlm_loss, expected.mlm_loss)
        torch.testing.assert_close(out.nsp_loss, expected.nsp_loss)
        torch.testing.assert_close(out.prediction_logits[: len(positions)], expected.prediction_logits)


def test_last_layer_is_computed_where_it_is_read():
    """Behind its attention, at labels and first tokens alone; the gradients are those of computing it everywhere."""
    model, inputs = BertForPreTraining(SMALL).eval(), packed(batch())
    rows = []
    for layer in model.bert.encoder["layer"]:
        layer.output.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    ours = gradients(model(**inputs).loss)
    read = B + len(inputs["masked_positions"])
    assert rows == [sum(LENGTHS)] * (SMALL.num_hidden_layers - 1) + [read] and read < sum(LENGTHS)
    every = model(**inputs | {"labels": None, "masked_positions": None})
    assert rows[SMALL.num_hidden_layers :] == [sum(LENGTHS)] * SMALL.num_hidden_layers
    mlm_loss = F.cross_entropy(every.prediction_logits[inputs["masked_positions"]], inputs["labels"])
    for a, b in zip(ours, gradients(mlm_loss + every.nsp_loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", [lambda padded: padded, packed], ids=["padded", "packed"])
def test_the_encoder_gives_the_states_that_are_asked_for(form):
    """And is called as a module by the pretraining model, so that hooks on it (FSDP2's among them) see the call."""
    model, inputs = BertForPreTraining(SMALL).eval(), form(batch())
    outputs = []
    model.bert.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(**inputs)
    places = (batch()["labels"].flatten() != -100).nonzero().squeeze(1)
    places = inputs.get("masked_positions", places)
    every = model.bert(**encoder_inputs(inputs))
    assert len(outputs) == 2 and outputs[0].sequence_output.shape == (len(places), SMALL.hidden_size)
    torch.testing.assert_close(outputs[0].sequence_output, every.sequence_output.flatten(0, -2)[places])
    torch.testing.assert_close(outputs[0].pooled_output, every.pooled_output)


def test_labels_at_padding_are_ignored():
    model, inputs = BertForPreTraining(SMALL).eval(), batch()
    spoiled = torch.where(inputs["attention_mask"] == 0, 7, inputs["labels"])
    torch.testing.assert_close(model(**inputs | {"labels": spoiled}).mlm_loss, model(**inputs).mlm_loss)


def test_without_labels_masked_positions_choose_the_logits():
    model, inputs = BertForPreTraining(SMALL).eval(), packed(batch())
    del inputs["labels"], inputs["next_sentence_label"]
    some = model(**inputs)
    every = model(**inputs | {"masked_positions": None})
    assert every.prediction_logits.shape == (sum(LENGTHS), V) and some.loss is None
    torch.testing.assert_close(some.prediction_logits, every.prediction_logits[inputs["masked_positions"]])


@pytest.mark.parametrize(
    "empty", [{"labels": torch.full((B, S), -100)}, {"next_sentence_label": torch.full((B,), -100)}]
)
def test_a_batch_without_labels_to_count_has_loss_zero(empty):
    model = BertForPreTraining(SMALL).eval()
    out = model(**batch() | empty)
    loss = out.mlm_loss if "labels" in empty else out.nsp_loss
    assert loss == 0
    loss.backward()
    assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


def test_micro_batches_weighted_by_their_labels_add_up_to_the_batch():
    model, inputs = BertForPreTraining(SMALL).eval(), batch()
    whole = model(**inputs).mlm_loss
    counts = (inputs["labels"] != -100).sum(1)
    parts = [model(**{k: v[row : row + 1] for k, v in inputs.items()}).mlm_loss for row in range(B)]
    torch.testing.assert_close(sum(p * n for p, n in zip(parts, counts, strict=True)) / counts.sum(), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_parameter_gets_a_gradient(backend):
    model = BertForPreTraining(SMALL)
    with fastbert.use_backend(backend):
        model(**packed(batch())).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["autocast", "whole"])
def test_bfloat16_computes_in_bfloat16_with_losses_in_float32(backend, form):
    model, inputs = BertForPreTraining(SMALL).eval(), packed(batch())
    truth = model(**inputs)
    dtypes = set()
    if form == "whole":
        model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.Linear | LinearGELU):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with fastbert.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        out = model(**inputs)
    out.loss.backward()
    assert dtypes == {torch.bfloat16} and out.prediction_logits.dtype == torch.bfloat16
    assert out.loss.dtype == out.mlm_loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, truth.loss, atol=0.05, rtol=0)
    expected = torch.float32 if form == "autocast" else torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {expected}


# --- no waiting, compile ---------------------------------------------------------------------------------------------


def test_the_packed_form_never_waits_for_the_device():
    """On meta tensors, which have no values, whatever needs one raises: `.item()`, boolean indexing, nonzero."""
    with torch.device("meta"):
        model = BertForPreTraining(SMALL)
        inputs = {
            "input_ids": torch.zeros(23, dtype=torch.long),
            "token_type_ids": torch.zeros(23, dtype=torch.long),
            "cu_seqlens": torch.zeros(5, dtype=torch.int32),
            "max_seqlen": S,
            "masked_positions": torch.zeros(6, dtype=torch.long),
            "labels": torch.zeros(6, dtype=torch.long),
            "next_sentence_label": torch.zeros(4, dtype=torch.long),
        }
        out = model(**inputs)
        out.loss.backward()
        assert out.prediction_logits.shape == (6, V) and out.loss.device.type == "meta"
        with pytest.raises(NotImplementedError, match="nonzero"):
            model(**inputs | {"masked_positions": None, "labels": torch.zeros(23, dtype=torch.long)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_the_packed_form_compiles_whole():
    """Losses and gradients as in eager mode, in two graphs at most for any number of tokens."""
    torch.compiler.reset()
    model = BertForPreTraining(SMALL).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed, lengths in enumerate([[12, 7, 3, 1], [9, 8, 7, 6], [11, 2, 4, 5], [3, 10, 6, 12]]):
        inputs = packed(batch(seed, lengths))
        results = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(**inputs).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_dropout_compiles_too():
    torch.compiler.reset()
    model, inputs = BertForPreTraining(SMALL).train(), packed(batch())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = {compiled(**inputs).loss.item() for _ in range(3)}
    assert len(losses) == 3, "the mask was drawn once, while compiling"


# --- training beside a plain PyTorch BERT ----------------------------------------------------------------------------


def plain_loss(p: dict[str, Tensor], config: BertConfig, inputs: dict[str, Tensor]) -> Tensor:
    """BERT without dropout in torch's own functions, padded, from weights under Hugging Face's names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[name + ".weight"], p[name + ".bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], config.layer_norm_eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)

    ids, table = inputs["input_ids"], "bert.embeddings.{}_embeddings.weight"
    x = F.embedding(ids, p[table.format("word")], padding_idx=0) + p[table.format("position")][: ids.shape[1]]
    x = norm(x + F.embedding(inputs["token_type_ids"], p[table.format("token_type")]), "bert.embeddings.LayerNorm")
    visible = inputs["attention_mask"].bool()[:, None, None, :]
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}."
        q, k, v = (heads(linear(x, f"{layer}attention.self.{part}")) for part in ("query", "key", "value"))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        x = norm(x + linear(context, layer + "attention.output.dense"), layer + "attention.output.LayerNorm")
        inner = linear(F.gelu(linear(x, layer + "intermediate.dense")), layer + "output.dense")
        x = norm(x + inner, layer + "output.LayerNorm")
    hidden = norm(F.gelu(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    logits = F.linear(hidden, p[table.format("word")], p["cls.predictions.bias"])
    next_sentence = linear(torch.tanh(linear(x[:, 0], "bert.pooler.dense")), "cls.seq_relationship")
    mlm_loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
    return mlm_loss + F.cross_entropy(next_sentence, inputs["next_sentence_label"])


def undropped() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(SMALL).eval()


def train(loss_of, parameters, steps: int = 20) -> Tensor:
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(batch(step, lengths=[12, 1 + step % 11, 5, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@functools.cache
def plain_curve(dtype: torch.dtype) -> Tensor:
    model = undropped()
    weights = to_hugging_face(model.state_dict(), BERT)
    p = {name: x.detach().clone().to(dtype).requires_grad_() for name, x in weights.items()}
    return train(lambda inputs: plain_loss(p, model.config, inputs), p.values())


@pytest.mark.parametrize("form", [dict, packed])
@pytest.mark.parametrize("backend", BACKENDS)
def test_20_steps_give_the_loss_curve_of_a_plain_pytorch_bert(backend, form):
    model, baseline, truth = undropped(), plain_curve(torch.float32), plain_curve(torch.float64)
    with fastbert.use_backend(backend):
        ours = train(lambda inputs: model(**form(inputs)).loss, model.parameters())
    assert truth[-1] < truth[0] - 0.5, "it does not learn, so equal curves would prove little"
    assert_close(ours, baseline, truth, "loss curve")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_with_dropout_every_backend_has_the_loss_curve_of_the_reference(backend):
    def curve(name: str, seed: int) -> Tensor:
        torch.manual_seed(0)
        model = BertForPreTraining(SMALL)
        torch.manual_seed(seed)
        with fastbert.use_backend(name):
            return train(lambda inputs: model(**packed(inputs)).loss, model.parameters())

    reference = curve("reference", 1)
    torch.testing.assert_close(curve(backend, 1), reference, atol=1e-4, rtol=1e-5)
    assert (curve(backend, 2) - reference).abs().max() > 0.05, "other masks must show in the curve"
