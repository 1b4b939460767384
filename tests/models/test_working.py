"""The bfloat16 copy that computes steps: its weights are the optimizer's, its gradients the model's."""

import copy
import dataclasses

import pytest
import torch
from bert_batches import SMALL, V, batch, packed
from torch.nn import functional as F

import fastbert
from fastbert.models.working import WorkingCopy
from fastbert.ops.linear import padded_linear
from fastbert.testing import assert_close


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [fastbert.BertForPreTraining, fastbert.AlbertForPreTraining])
def test_steps_by_a_working_copy(kind, micro_batches):
    """Every step's loss and norm are those of autocast but for rounding, and the copy is the model rounded."""
    names = {field.name for field in dataclasses.fields(kind.config_class)}
    fields = {name: value for name, value in dataclasses.asdict(SMALL).items() if name in names}
    model = kind(kind.config_class(**fields)).train()
    twin = copy.deepcopy(model)
    inputs = packed(batch())
    inputs[kind.sentence_label] = inputs.pop("next_sentence_label")
    optimizer, its = (fastbert.LazyAdam(m.parameters(), lr=1e-3) for m in (model, twin))
    working = WorkingCopy(model, optimizer, micro_batches)
    for number in range(2):  # rounding has led the two astray by the third step
        results = []
        for computes, stepped in ((working.model, optimizer), (twin, its)):
            torch.manual_seed(number)
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=computes is twin):
                    out = computes(**inputs)
                out.loss.backward()
            if computes is working.model:
                working.hand_over_gradients()
                kept = torch.bfloat16 if micro_batches == 1 else torch.float32
                assert model.word_embeddings.grad.dtype == kept
                assert out.prediction_logits.stride() == (V + -V % 8, 1)
            norm, factor = stepped.clip_factor(1.0)
            stepped.step(grad_factor=factor)
            stepped.zero_grad()
            results.append(torch.stack([out.loss.detach(), norm]))
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    for (name, param), own in zip(model.named_parameters(), working.model.parameters(), strict=True):
        if "LayerNorm" in name or name.endswith(
            ("output.dense.bias", "intermediate.dense.bias", "transform.dense.bias")
        ):
            assert own is param
        else:
            assert torch.equal(own, param.bfloat16()) and own.dtype == torch.bfloat16, name


def test_a_padded_product_is_the_product():
    """Its gradients too, whether the results' gradient comes padded or not."""
    x, weight, bias, dy = (torch.randn(shape).bfloat16() for shape in ((6, 16), (13, 16), (13,), (6, 13)))
    whole = F.pad(weight, (0, 0, 0, 3)), F.pad(bias, (0, 3))

    def results(function, dy, *inputs):
        leaves = [each.detach().requires_grad_() for each in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    truth = results(F.linear, dy.double(), x.double(), weight.double(), bias.double())
    theirs = results(F.linear, dy, x, weight, bias)
    for given in (dy, F.pad(dy, (0, 3))[:, :13]):
        ours = results(lambda *leaves: padded_linear(*leaves, *whole), given, x, whole[0][:13], whole[1][:13])
        assert ours[0].stride() == (16, 1)
        for three in zip(ours, theirs, truth, strict=True):
            assert_close(*three)
    with pytest.raises(ValueError, match="bias must be the first rows of padded_bias"):
        padded_linear(x, whole[0][:13], bias.float(), *whole)


@pytest.mark.parametrize("kind", [fastbert.BertForPreTraining, fastbert.AlbertForPreTraining])
def test_layers_computed_again_give_the_same_bits(kind):
    """By the backend and library of the forward pass, outside of whose block backward runs."""
    model = kind(kind.config_class.preset("base", **SIZES)).train()
    inputs = packed(batch())
    inputs[kind.sentence_label] = inputs.pop("next_sentence_label")
    gradients, saved = [], []
    for model.base_model.checkpoint_layers in (False, True):
        torch.manual_seed(3)
        saved.append(0)

        def pack(x):
            saved[-1] += x.numel()
            return x

        chosen = fastbert.use_backend("reference"), fastbert.use_linear("torch")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), chosen[0], chosen[1]:
            loss = model(**inputs).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.6 * saved[0]


SIZES = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
