"""The building blocks: parameters and one call each, held against torch's own modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastbert
from fastbert.models.layers import (
    DenseAddLayerNorm,
    Dropout,
    DropoutAddLayerNorm,
    LayerNorm,
    Linear,
    LinearGELU,
    MultiHeadAttention,
)
from fastbert.testing import assert_close

BACKENDS = [name for name in fastbert.backends() if name != "triton"]  # which takes no tensors here, or interprets


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def test_layer_norm_starts_as_one_and_zero():
    assert LayerNorm(2).weight.tolist() == [1, 1] and LayerNorm(2).bias.tolist() == [0, 0]
    # mean 2, deviation 1
    torch.testing.assert_close(LayerNorm(2)(torch.tensor([[1.0, 3.0]])), torch.tensor([[-1.0, 1.0]]))


def test_dropout_add_layer_norm_adds_the_residual_and_drops_in_training_only():
    module = randomized(DropoutAddLayerNorm(32, dropout_p=0.5))
    x, residual = torch.randn(2, 7, 32)
    expected = F.layer_norm(x + residual, (32,), module.weight, module.bias, 1e-12)
    torch.testing.assert_close(module.eval()(x, residual), expected)
    assert not torch.allclose(module.train()(x, residual), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_add_layer_norm_leaves_its_bias_to_layer_norm(backend):
    module = randomized(DenseAddLayerNorm(9, 16, eps=1e-5)).eval()
    x, residual, dy, dy2 = torch.randn(5, 9), *torch.randn(3, 5, 16)
    leaves = [x.requires_grad_(), residual.requires_grad_(), *module.parameters()]
    dense, norm = module.dense, module.LayerNorm
    expected = F.layer_norm(F.linear(x, dense.weight, dense.bias) + residual, (16,), norm.weight, norm.bias, 1e-5)
    with fastbert.use_backend(backend):
        y, y2 = module(x, residual)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, y2)
    for a, b in zip(
        torch.autograd.grad([y, y2], leaves, [dy, dy2]), torch.autograd.grad(expected, leaves, dy + dy2), strict=True
    ):
        torch.testing.assert_close(a, b)


class Adapter(nn.Module):
    """As those of libraries that put theirs in a layer's place: the layer's result and something more."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + 1.0


def test_what_stands_in_a_dense_layers_place_adds_the_bias_itself():
    module = randomized(DenseAddLayerNorm(9, 16)).eval()
    x, residual = torch.randn(5, 9), torch.randn(5, 16)
    whole = F.linear(x, module.dense.weight, module.dense.bias)
    seen = []
    hook = module.dense.register_forward_hook(lambda layer, inputs, out: seen.append(out))
    torch.testing.assert_close(module(x, residual)[0], module.LayerNorm(whole, residual))
    torch.testing.assert_close(seen, [whole])
    hook.remove()
    module.dense = Adapter(module.dense)
    torch.testing.assert_close(module(x, residual)[0], module.LayerNorm(whole + 1.0, residual))
    assert type(module.dense.layer) is Linear


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu_is_linear_then_gelu(approximate):
    module = randomized(LinearGELU(5, 9, approximate))
    assert not isinstance(module, torch.nn.Linear), "adapters and quantizers would take it for one"
    x = torch.randn(4, 5)
    expected = F.gelu(F.linear(x, module.weight, module.bias), approximate=approximate)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_multi_head_attention_is_that_of_torch_for_every_sequence(backend):
    module = randomized(MultiHeadAttention(24, 3))
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(module.qkv.weight)
        theirs.in_proj_bias.copy_(module.qkv.bias)
        theirs.out_proj.weight.copy_(torch.eye(24))
    x = torch.randn(8, 24)
    with fastbert.use_backend(backend):
        out = module(x, torch.tensor([0, 3, 8], dtype=torch.int32), 5)
    expected = torch.cat([theirs(part, part, part, need_weights=False)[0] for part in (x[:3], x[3:])])
    torch.testing.assert_close(out, expected)


def test_attention_drops_in_training_only():
    module = randomized(MultiHeadAttention(16, 2, dropout_p=0.5))
    x, cu_seqlens = torch.randn(6, 16), torch.tensor([0, 6], dtype=torch.int32)
    module.eval()
    assert torch.equal(module(x, cu_seqlens, 6), module(x, cu_seqlens, 6))
    module.train()
    assert not torch.equal(module(x, cu_seqlens, 6), module(x, cu_seqlens, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_scales_the_rest(backend, dtype):
    x = torch.full((300, 70), 3.0, dtype=dtype, requires_grad=True)
    with fastbert.use_backend(backend):
        y = Dropout(0.25)(x)
        y.sum().backward()
    dropped = y == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.02  # 7 standard deviations of 21,000 draws
    assert torch.equal(y[~dropped].unique(), torch.tensor([4.0], dtype=dtype))
    assert torch.equal(x.grad == 0, dropped), "backward draws another mask"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_follow_the_seed_and_not_the_backend(backend):
    def draw(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with fastbert.use_backend(name):
            return Dropout(0.1)(torch.ones(33, 20))

    assert torch.equal(draw(backend, 1), draw("reference", 1))
    assert not torch.equal(draw(backend, 1), draw(backend, 2))


def test_dropout_does_nothing_in_evaluation_and_with_p_zero():
    x = torch.randn(3, 4)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_blocks_compute_in_bfloat16(backend):
    module = randomized(nn.Sequential(LayerNorm(64), LinearGELU(64, 48)))
    x = torch.randn(20, 64)
    with torch.no_grad():
        with fastbert.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            ours = module(x)
            norm, dense = module
            theirs = F.gelu(F.linear(F.layer_norm(x, (64,), norm.weight, norm.bias), dense.weight, dense.bias))
        truth = module.double()(x.double()) if backend == "reference" else None
    assert ours.dtype == torch.bfloat16
    if truth is not None:
        assert_close(ours, theirs, truth)
    else:
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
