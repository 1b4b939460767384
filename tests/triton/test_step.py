"""A step of BERT tiny runs whole on the interpreted Triton kernels and gives what the CPU's and CUDA's give."""

import copy

import emulated
import emulated_backend
import torch
from bert_batches import batch, packed, training_step

import fastbert


def test_a_step_of_bert_tiny_agrees_on_all_backends(triton):
    """Dropout of its usual tenth draws the same masks; clipping and the step lie on the kernels too."""
    inputs = packed(batch(lengths=[9, 4]))
    config = fastbert.BertConfig.preset("tiny", vocab_size=50, max_position_embeddings=16)
    model = fastbert.BertForPreTraining(config).train()
    on_cpu, on_cuda, other = (copy.deepcopy(model) for _ in range(3))
    result = training_step(model, inputs)
    with fastbert.use_backend("cpu"):
        expected = training_step(on_cpu, inputs)
        different = training_step(other, inputs, seed=8)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert abs(different[0] - expected[0]) > 1e-3, "other masks give another loss"
    for (name, ours), theirs in zip(model.named_parameters(), on_cpu.parameters(), strict=True):
        # a step of Adam is the sign of a gradient: where that is nothing but rounding, the weight may go either way
        changed = (ours - theirs).abs()
        assert changed.mean() < 3e-4 and changed.max() < 2.1e-3, name
    if emulated.why_not() is None:
        with emulated_backend.installed(emulated_backend.module(trace=False)), fastbert.use_backend("cuda"):
            torch.testing.assert_close(training_step(on_cuda, inputs), result, rtol=1e-5, atol=1e-5)
