"""What is not packed: refused by name when a model is patched, or computed as before with one warning a reason."""

import functools
import warnings

import pytest
import torch
from patched_models import MASK, batch, make, real, transformers
from torch import nn

import fastbert
from fastbert.patching import obstacles


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(obstacles, "_told", set())


def hooked(model, name, register="register_forward_hook"):
    getattr(model.get_submodule(name), register)(lambda *_: None)


def with_own_forward(model):
    model.forward = functools.partial(model.forward)
    return model


def wrapped(model):
    inner = model.encoder.layer[1].output
    model.encoder.layer[1].output = nn.Sequential(inner)
    model.encoder.layer[1].output.forward = lambda x, residual: inner(x, residual)


class Adapter(nn.Linear):
    """None of torch's own classes: it is called."""


def adapted(model):
    layer = model.encoder.layer[0].output
    adapter = Adapter(96, 48)
    adapter.load_state_dict(layer.dense.state_dict())
    adapter.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    layer.dense = adapter


CALLS = {
    "four axes": (
        lambda model, inputs: inputs | {"attention_mask": torch.zeros(4, 1, 20, 20)},
        r"attention_mask has 4 axes, where padding is marked by \[batch, tokens\]",
    ),
    "padding first": (
        lambda model, inputs: inputs | {"attention_mask": MASK.flip(1)}, "a sequence begins with padding"
    ),
    "attention's weights": (
        lambda model, inputs: inputs | {"output_attentions": True}, "attention's weights, which are never stored"
    ),
    "one hidden state": (lambda model, inputs: inputs | {"output_hidden_states": [1]}, "names single layers"),
    "a causal call": (lambda model, inputs: inputs | {"is_causal": True}, "is_causal was given"),
    "a decoder": (lambda model, inputs: setattr(model.config, "is_decoder", True) or inputs, "it is a decoder"),
    "a hook": (
        lambda model, inputs: hooked(model, "encoder.layer.1.output.LayerNorm") or inputs,
        r"of encoder\.layer\.1\.output\.LayerNorm: it has hooks, which would not be called",
    ),
    "a hook before": (
        lambda model, inputs: hooked(model, "encoder.layer.0", "register_forward_pre_hook") or inputs,
        r"of encoder\.layer\.0: it has hooks",
    ),
    "a hook of the embeddings": (
        lambda model, inputs: hooked(model, "embeddings.LayerNorm") or inputs,
        r"of embeddings\.LayerNorm: it has hooks",
    ),
    "a forward put over": (
        lambda model, inputs: with_own_forward(model.encoder.layer[2].intermediate.dense) and inputs,
        r"of encoder\.layer\.2\.intermediate\.dense: it has a `forward` of its own, which would not be called",
    ),
    "adapters by text": (
        lambda model, inputs: adapted(model) or inputs,
        r"of encoder\.layer\.0\.output\.dense: it has a hook on its arguments, which may count texts",
    ),
    "a wrapper": (
        lambda model, inputs: wrapped(model) or inputs,
        r"of encoder\.layer\.1: it has other parts than transformers' own layer: 'Sequential' object has no .* 'dense'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_computed_as_before_and_said_once(case):
    model = make("bert", attn_implementation="eager")
    change, why = CALLS[case]
    fastbert.patch(model)
    inputs = change(model, batch(model))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=why):
            ours = model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
        theirs = fastbert.unpatch(model)(**inputs)
    assert ours.keys() == theirs.keys()
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(ours[name], theirs[name])


def test_hooks_of_hidden_states_do_not_stay_in_the_way():
    """transformers leaves them on every layer once hidden states or weights were asked for."""
    model = make("bert", attn_implementation="eager")
    inputs = batch(model)
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    fastbert.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model(**inputs, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(real(ours), real(theirs), atol=1e-5, rtol=0)


def test_a_forward_that_is_the_classs_own_is_no_obstacle():
    """transformers 5.0 leaves such behind where hidden states were asked for."""
    model = make("bert")
    for module in (model, model.encoder.layer[0]):
        module.forward = module.forward
    with torch.no_grad():
        assert not fastbert.patch(model)(**batch(model))[0][MASK == 0].any()


def test_hooks_of_what_is_called_are_called():
    model, seen = fastbert.patch(make("bert")), []
    for name in ("", "embeddings.word_embeddings", "pooler"):
        model.get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    model(**batch(model))
    assert seen == ["Embedding", "BertPooler", "BertModel"]


def test_traces_and_exports_are_those_of_transformers():
    model = fastbert.patch(make("bert", "AutoModelForSequenceClassification"))
    inputs = batch(model)
    with pytest.warns(UserWarning, match="an export would keep this batch's lengths"):
        exported = torch.export.export(model, (), inputs, strict=False).module()
    other = dict(inputs, attention_mask=MASK.roll(1, 0))
    torch.testing.assert_close(exported(**other).logits, model(**other).logits, atol=1e-5, rtol=0)


class OwnForward(transformers.BertModel):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)


class NoForward(transformers.BertModel):
    pass


REFUSED = {
    "another activation": (
        lambda: make("bert", hidden_act="relu"),
        r"of encoder\.layer\.0\.output: its activation is torch\.nn\.modules\.activation\.ReLU, not a GELU",
    ),
    "a decoder": (lambda: make("bert", is_decoder=True), "it is a decoder"),
    "chunks": (
        lambda: make("bert", chunk_size_feed_forward=4), r"encoder\.layer\.0: chunk_size_feed_forward is 4"
    ),
    "a subclass": (
        lambda: OwnForward(make("bert").config), r"1 \(OwnForward\) has a `forward` of its own, which patching"
    ),
    "an instance": (lambda: with_own_forward(make("bert")), r"1 \(BertModel\) has a `forward` of its own on"),
    "another type": (
        lambda: transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)),
        "GPT2Model of type 'gpt2' holds no model that fastbert.patch takes, which are BertModel, RobertaModel",
    ),
    "no model": (lambda: nn.Linear(2, 2), "Linear holds no model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_patched_is_named_and_nothing_is_changed(case):
    made, why = REFUSED[case]
    both = nn.ModuleList([made()]) if case in ("no model", "another type") else nn.ModuleList([make("roberta"), made()])
    before = [type(module) for module in both.modules()]
    with pytest.raises(ValueError, match=why):
        fastbert.patch(both[0] if len(both) == 1 else both)
    assert [type(module) for module in both.modules()] == before


def test_a_subclass_that_keeps_its_forward_is_patched():
    model = NoForward(make("bert").config).eval()
    inputs = batch(model)
    with torch.no_grad():
        theirs, ours = model(**inputs)[0], fastbert.patch(model)(**inputs)[0]
    assert isinstance(model, NoForward) and not ours[MASK == 0].any()
    torch.testing.assert_close(real(ours), real(theirs), atol=1e-5, rtol=0)


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, got str"):
        fastbert.patch("bert-base-uncased")
