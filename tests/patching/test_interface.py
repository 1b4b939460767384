"""attn_implementation="fastbert": full and causal attention in any model that goes through the interface."""

import re

import pytest
import torch
from patched_models import CONFIGS, MASK, batch, make, real, transformers

import fastbert

MASKS = {"right": MASK, "left": MASK.flip(1), "holes": MASK * (torch.arange(20) % 4 != 2), "none": None}


@pytest.fixture(autouse=True, scope="module")
def registered():
    fastbert.register_attention()


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_is_that_of_sdpa(kind):
    model = make(kind)
    for name, mask in MASKS.items():
        inputs, rows = batch(model) | {"attention_mask": mask}, torch.ones_like(MASK) if mask is None else mask
        outs = []
        for implementation in ("sdpa", "fastbert"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                outs.append(model(**inputs)[0][rows.bool()])
        torch.testing.assert_close(*outs, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_and_dropout():
    model = make("bert", attn_implementation="fastbert")
    expected = real(model(**batch(model))[0])
    (gradient,) = torch.autograd.grad(expected.square().sum(), model.embeddings.word_embeddings.weight)
    model.set_attn_implementation("sdpa")
    (theirs,) = torch.autograd.grad(
        real(model(**batch(model))[0]).square().sum(), model.embeddings.word_embeddings.weight
    )
    torch.testing.assert_close(gradient, theirs, atol=1e-3, rtol=1e-4)
    model.set_attn_implementation("fastbert")
    for layer in model.encoder.layer:
        layer.attention.self.train()
    torch.manual_seed(1)
    dropped = real(model(**batch(model))[0])
    torch.manual_seed(1)
    assert torch.equal(dropped, real(model(**batch(model))[0])) and (dropped - expected).abs().max() > 0.1


def causal_model(**more):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | more)).eval()


def test_causal_attention_of_another_model():
    model, inputs = causal_model(), {"input_ids": torch.arange(80).view(4, 20), "attention_mask": MASK}
    theirs = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("fastbert")
    torch.testing.assert_close(real(model(**inputs, use_cache=False).logits), real(theirs), atol=1e-5, rtol=0)


def test_what_it_does_not_compute_is_refused():
    model, ids = causal_model(), torch.arange(6).view(1, 6)
    model.set_attn_implementation("fastbert")
    with pytest.raises(ValueError, match="whole sequences, got 1 queries beside 7 keys"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=99)
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    windowed = transformers.MistralModel(transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4))
    windowed.set_attn_implementation("fastbert")
    with pytest.raises(ValueError, match="such as a window"):
        windowed(ids, use_cache=False)
    shared = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    shared.set_attn_implementation("fastbert")
    with pytest.raises(ValueError, match="heads that share keys"):
        shared(ids, use_cache=False)
    bert = make("bert", attn_implementation="fastbert")
    for shape in ([4, 1, 20, 20], [4, 19]):
        with pytest.raises(ValueError, match=re.escape(f"[batch, tokens], here [4, 20], got one of shape {shape}")):
            bert(**batch(bert) | {"attention_mask": torch.ones(shape, dtype=torch.bool)})
