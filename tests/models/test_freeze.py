"""Linear layers with constant weights, by each library: against float64, what they refuse, what stays as it was."""

import copy

import pytest
import torch
from bert_batches import SMALL
from torch import nn
from torch._subclasses import FakeTensorMode

import fastbert
from fastbert.backends import linear as kernels
from fastbert.models.frozen import FrozenWeight
from fastbert.models.layers import Linear, LinearGELU
from fastbert.testing import assert_close

needs_onednn = pytest.mark.skipif(kernels.onednn_missing is not None, reason=str(kernels.onednn_missing))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [Linear, LinearGELU])
@pytest.mark.parametrize("biased", [True, False])
def test_frozen_layers_close_to_truth(library, nan_filled, layer, dtype, biased):
    module = layer(24, 40)
    if not biased:
        module.bias = None
    module, truth = module.to(dtype), copy.deepcopy(module.to(dtype)).double()
    frozen = fastbert.freeze(copy.deepcopy(module))
    with fastbert.use_backend("reference"):  # which takes float64
        for shape in [(24,), (1, 24), (0, 24), (3, 5, 24), (1100, 24)]:
            x = torch.randn(shape).to(dtype)
            assert_close(frozen(x), module(x), truth(x.double()), what=str(shape))
        across = torch.randn(24, 7).to(dtype).t()
        assert torch.equal(frozen(across), frozen(across.contiguous()))


def test_frozen_model_is_the_model(library):
    """In float32, and in bfloat16 under autocast, on padded and packed batches; the weights are gone."""
    model, ids = fastbert.BertModel(SMALL).eval(), torch.randint(1, 50, (3, 8))
    batches = {"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[3], [8], [5]])).long()}, {
        "input_ids": ids.flatten(), "cu_seqlens": torch.tensor([0, 5, 6, 14, 16, 24], dtype=torch.int32),
    }  # fmt: skip
    for batch in batches:
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(**batch)
            for dtype in (torch.float32, torch.bfloat16):
                frozen = fastbert.freeze(copy.deepcopy(model), dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    for results in zip(frozen(**batch), model(**batch), truth, strict=True):
                        assert_close(*results)
    assert not any("dense.weight" in name or "qkv.weight" in name for name, _ in frozen.named_parameters())
    assert all(not p.requires_grad for p in frozen.parameters()) and not frozen.training
    again = copy.deepcopy(frozen)
    assert again.pooler["dense"].weight is frozen.pooler["dense"].weight


def test_frozen_layers_refuse_what_they_cannot_do(library, tmp_path):
    model = fastbert.freeze(nn.Sequential(Linear(8, 4), nn.Dropout()))
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="gives no gradients: run under"):
        model(x.requires_grad_())
    with pytest.raises(TypeError, match=r"in torch\.float32 takes x and bias of that dtype, got torch\.bfloat16"):
        model(x.detach().bfloat16())
    for wrong in (torch.randn(3, 4), torch.randn(3, 8, device="meta")):
        with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 8\] on the cpu"):
            model(wrong)
    for wrong in (torch.randn(3), torch.randn(4, device="meta")):
        with pytest.raises(RuntimeError, match=r"bias must be \[4\] on the cpu"), torch.no_grad():
            model[0].weight.product(x.detach(), wrong)
    for what, save in (
        ("0 is frozen and", lambda: model.state_dict()),
        ("a frozen weight", lambda: torch.save(model[0].weight, tmp_path / "weight.pt")),
    ):
        with pytest.raises(RuntimeError, match=f"^{what} cannot be saved: save the model before it is frozen$"):
            save()
    with pytest.raises(
        ValueError, match="Sequential has no fastbert Linear or LinearGELU layer that is not frozen yet"
    ):
        fastbert.freeze(model)


def test_frozen_products_by_our_own_kernel_are_seen_by_those_who_look_at_ops():
    with fastbert.use_linear("fastbert"):
        weight = FrozenWeight(torch.randn(5, 8), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = weight.product(torch.randn(2, 3, 8), None)
    assert mode.is_our_fake(y) and y.shape == (2, 3, 5)


def test_a_frozen_model_is_not_half_saved(library, tmp_path):
    model = fastbert.freeze(fastbert.BertModel(SMALL))
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.0.* is frozen and cannot be saved"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@needs_onednn
def test_what_cannot_be_frozen_stays_as_it_was(monkeypatch):
    model = nn.Sequential(Linear(8, 4), Linear(4, 2).half()).train()
    with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch\.float16"):
        fastbert.freeze(model)
    with pytest.raises(ValueError, match="on the cpu, got one of"):
        fastbert.freeze(nn.Sequential(Linear(8, 4), Linear(4, 2).to("meta")))
    monkeypatch.setattr(kernels, "onednn_missing", "gone")
    with fastbert.use_linear("torch"), pytest.raises(RuntimeError, match="cannot be frozen here: gone"):
        fastbert.freeze(model[:1])
    assert all(isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad for layer in model)
    assert model.training
