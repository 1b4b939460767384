"""A pretraining step of BERT tiny runs whole on the emulated kernels for GPUs and gives what the CPU's give."""

import copy

import emulated
import emulated_backend
import pytest
import torch
from bert_batches import batch, packed, training_step

import fastbert


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "working copy"], ids=str)
def test_a_step_of_bert_tiny(dtype):
    """Dropout draws the same masks; clipping and the step lie on the kernels too. "working copy" is bfloat16 beside."""
    inputs = packed(batch())
    sizes = {"vocab_size": 50, "max_position_embeddings": 16}
    model = fastbert.BertForPreTraining(fastbert.BertConfig.preset("tiny", **sizes)).train()
    twin = copy.deepcopy(model)
    with emulated_backend.installed(emulated_backend.module(trace=False)), fastbert.use_backend("cuda"):
        result = training_step(model, inputs, dtype)
    expected = training_step(twin, inputs, dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        # a step of Adam is the sign of a gradient: where that is nothing but rounding, the weight may go either way
        changed = (ours - theirs).abs()
        assert changed.mean() < 3e-4 and changed.max() < 2.1e-3, name
