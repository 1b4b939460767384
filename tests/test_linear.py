"""Linear layers' products by oneDNN: against float64, with constant weights, the choice of the library, its bounds."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fastbert
from fastbert.bert import BertConfig
from fastbert.nn import Linear, LinearGELU
from fastbert.ops import linear as op
from fastbert.testing import assert_close, run

raw = torch.ops.fastbert  # as the dispatcher has them

needs_onednn = pytest.mark.skipif(op.onednn_missing is not None, reason=str(op.onednn_missing))


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN for products of every size, and the shapes of those it computes."""
    if op.onednn_missing:
        pytest.skip(op.onednn_missing)
    seen, product = [], op.onednn_linear

    def counted(x, weight, bias):
        seen.append((*x.shape, weight.shape[0]))
        return product(x, weight, bias)

    monkeypatch.setattr(op, "SMALL", dict.fromkeys(op.SMALL, 1))
    monkeypatch.setattr(op, "onednn_linear", counted)
    with fastbert.use_linear("onednn"):
        yield seen


# x, N
SHAPES = [((1, 1), 1), ((3, 5), 7), ((8,), 4), ((2, 3, 8), 5), ((2, 1, 3, 16), 33), ((65, 64), 48), ((77, 96), 301)]


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_close_to_truth(onednn, nan_filled, shape, out, biased, dtype):
    inputs = [torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out) if biased else None]
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    dy = torch.randn(*shape[:-1], out, dtype=dtype)
    ours, theirs = (run(f, inputs, dy) for f in (fastbert.linear, F.linear))
    truth = run(F.linear, [None if x is None else x.double() for x in inputs], dy.double())
    for name, *results in zip(("y", "dx", "dweight", "dbias"), ours, theirs, truth, strict=False):
        assert_close(*results, what=name, scale=shape[-1] ** 0.5)
    backward_too = dtype == torch.float32 or not op.bfloat16_products
    assert len(onednn) == (3 if backward_too else 1), "not every product was oneDNN's"


@pytest.fixture
def widened(monkeypatch):
    monkeypatch.setattr(op, "SMALL", dict.fromkeys(op.SMALL, 1))
    with fastbert.use_linear("widened"):
        yield


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_widened(widened, nan_filled, shape, out, biased, autocast):
    """float32 weights are neither rounded nor are their gradients; bfloat16 results are rounded once."""
    x, dy = torch.randn(shape).bfloat16(), torch.randn(*shape[:-1], out).bfloat16()
    parameters = [torch.randn(out, shape[-1]), *([torch.randn(out)] if biased else [])]
    parameters = parameters if autocast else [p.bfloat16() for p in parameters]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = run(fastbert.linear, [x, *parameters], dy)
    in_float32 = run(F.linear, [t.float() for t in (x, *parameters)], dy.float())
    truth = run(F.linear, [t.double() for t in (x, *parameters)], dy.double())
    for name, *results in zip(("y", "dx", "dweight", "dbias"), ours, in_float32, truth, strict=False):
        dtype = torch.bfloat16 if name in ("y", "dx") else parameters[0].dtype
        assert results[0].dtype == dtype
        assert_close(results[0], results[1].to(dtype), results[2], what=name, scale=shape[-1] ** 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_widened_compiled_equals_eager(widened):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastbert.linear, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (12, 40, 56):
            inputs, dy = (torch.randn(rows, 24), torch.randn(16, 24), torch.randn(16)), torch.randn(rows, 16).bfloat16()
            for ours, eager in zip(run(compiled, inputs, dy), run(fastbert.linear, inputs, dy), strict=True):
                assert ours.dtype == eager.dtype
                torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 2


def test_widened_is_for_bfloat16_alone(widened):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    assert torch.equal(fastbert.linear(x, weight), F.linear(x, weight))
    assert op.chosen(torch.float32) == "torch" and op.chosen(torch.bfloat16) == "widened"


def test_a_processor_without_bfloat16_products_widens(monkeypatch):
    monkeypatch.setattr(op, "bfloat16_products", False)
    with fastbert.use_linear("auto"):
        assert op.chosen(torch.bfloat16) == "widened" and op.chosen(torch.float32) != "widened"
        assert "no bfloat16 products: they are computed as float32 products" in op.info()
    with fastbert.use_linear("torch"):
        assert op.chosen(torch.bfloat16) == "torch"
        assert "many times slower than float32" in op.info()
    assert op.fastest(512, 768, 768, torch.bfloat16)[0] == "widened"


@pytest.mark.parametrize(("shape", "out"), [((0, 8), 5), ((4, 0), 5), ((4, 8), 0), ((2, 0, 8), 5)], ids=str)
def test_nothing_to_multiply_is_left_to_torch(onednn, shape, out):
    inputs = torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)
    dy = torch.randn(*shape[:-1], out)
    for ours, theirs in zip(run(fastbert.linear, inputs, dy), run(F.linear, inputs, dy), strict=True):
        assert torch.equal(ours, theirs)
    assert onednn == []


def test_any_strides(onednn):
    """Transposed, strided and expanded inputs and gradients: the values of their contiguous copies."""
    cases = [
        (torch.randn(24, 10).t(), torch.randn(24, 7).t(), torch.randn(14)[::2], torch.randn(7, 10).t()),
        (torch.randn(10, 72)[:, ::3], torch.randn(7, 30)[:, 3:27], torch.randn(1).expand(7), torch.randn(1, 7)),
        (torch.randn(2, 24, 5).mT, torch.randn(1, 24).expand(7, 24), torch.randn(7), torch.randn(())),
    ]
    for x, weight, bias, dy in cases:
        dy = dy.expand(*x.shape[:-1], 7)
        ours, copied = (
            run(fastbert.linear, [f(v) for v in (x, weight, bias)], f(dy))
            for f in (lambda v: v, torch.Tensor.contiguous)
        )
        for a, b in zip(ours, copied, strict=True):
            torch.testing.assert_close(a, b)
    assert len(onednn) == 18


@pytest.mark.parametrize(
    "wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 0)], ids=str
)
def test_only_the_gradients_that_are_wanted(onednn, wanted):
    inputs = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)
    for x, w in zip(inputs, wanted, strict=True):
        x.requires_grad_(bool(w))
    y = fastbert.linear(*inputs)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.square().sum().backward()
    assert [x.grad is not None for x in inputs] == [bool(w) for w in wanted]
    assert len(onednn) == 1 + wanted[0] + wanted[1]


def test_frozen_weights_keep_no_input(onednn):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        fastbert.linear(x, weight)
    assert saved == [weight.shape]


def test_a_weight_used_twice_adds_its_gradients(onednn):
    x, weight = torch.randn(6, 8), torch.randn(8, 8)
    dy = torch.randn(6, 8)

    def twice(linear):
        return lambda x, w: linear(linear(x, w).tanh(), w)

    ours, theirs = run(twice(fastbert.linear), (x, weight), dy), run(twice(F.linear), (x, weight), dy)
    truth = run(twice(F.linear), (x.double(), weight.double()), dy.double())
    for results in zip(ours, theirs, truth, strict=True):
        assert_close(*results, scale=8)


def test_a_gradient_of_a_gradient_is_refused(onednn):
    """It would be silently wrong if the op let it pass."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(fastbert.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_keeps_to_the_library_of_its_forward(onednn):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    y = fastbert.linear(x, weight)
    with fastbert.use_linear("torch"):
        z = fastbert.linear(x, weight)
        y.sum().backward()
    assert len(onednn) == 3
    z.sum().backward()
    assert len(onednn) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_torch(onednn, dtype):
    x, weight, bias = torch.randn(4, 8).to(dtype), torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype)
    assert torch.equal(fastbert.linear(x, weight, bias), F.linear(x, weight, bias)) and onednn == []


def test_autocast(onednn):
    """bfloat16 whatever the inputs are, and gradients in their own dtypes: as torch's autocast."""
    dy = torch.randn(4, 5).bfloat16()
    for kinds in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16,) * 3):
        inputs = [
            x.to(kind) for x, kind in zip((torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)), kinds, strict=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(fastbert.linear, inputs, dy), run(F.linear, inputs, dy)
        assert [x.dtype for x in ours] == [torch.bfloat16, *kinds]
        used = [x.bfloat16() for x in inputs] if op.bfloat16_products else [inputs[0].bfloat16(), *inputs[1:]]
        truth = run(F.linear, [x.double() for x in used], dy.double())
        for results in zip(ours, theirs, truth, strict=True):
            assert_close(*(x.bfloat16() for x in results[:2]), results[2], scale=8)
    assert len(onednn) == (3 if op.bfloat16_products else 9)


def test_other_autocast_and_other_devices_are_torch(onednn):
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.float16):
        y = fastbert.linear(x, weight)
        assert y.dtype == torch.float16 and torch.equal(y, F.linear(x, weight))
    assert fastbert.linear(x.to("meta"), weight.to("meta")).shape == (4, 5)
    assert onednn == []


@needs_onednn
def test_small_products_are_torch():
    x, small, large = torch.randn(256, 1024), torch.randn(255, 1024), torch.randn(256, 1024)  # 2^26 multiplications
    with fastbert.use_linear("onednn"):
        assert type(fastbert.linear(x, small.requires_grad_()).grad_fn).__name__ != "_LinearBackward"
        assert type(fastbert.linear(x, large.requires_grad_()).grad_fn).__name__ == "_LinearBackward"


def test_shapes_that_do_not_fit_get_torchs_message(onednn):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 7))
    with pytest.raises(RuntimeError, match="size"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 8), torch.randn(4))
    with pytest.raises(RuntimeError, match="dtype"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 8, dtype=torch.float64))


@needs_onednn
def test_custom_op_is_sound():
    x, weight, bias, dy = torch.randn(4, 24), torch.randn(6, 24), torch.randn(6), torch.randn(4, 6)
    torch.library.opcheck(raw.onednn_linear.default, (x, weight, bias))
    torch.library.opcheck(raw.onednn_linear.default, (dy, weight.t(), None))
    torch.library.opcheck(raw.onednn_linear.default, (dy.t(), x.t(), None))


@needs_onednn
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(monkeypatch, compiler):
    torch.compiler.reset()
    monkeypatch.setattr(op, "SMALL", dict.fromkeys(op.SMALL, 1))
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(fastbert.linear, fullgraph=True, backend=counter)
    with fastbert.use_linear("onednn"):
        for rows in (12, 40, 56):
            inputs, dy = (torch.randn(rows, 24), torch.randn(16, 24), torch.randn(16)), torch.randn(rows, 16)
            assert type(fastbert.linear(inputs[0], inputs[1].requires_grad_()).grad_fn).__name__ == "_LinearBackward"
            for ours, eager in zip(run(compiled, inputs, dy), run(fastbert.linear, inputs, dy), strict=True):
                torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 2


def test_every_product_of_the_model(onednn):
    """Of two layers four each, then pooler, masked word head and decoder; forward and both gradients."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=8, initializer_range=0.2,
    )  # fmt: skip
    model, ids = fastbert.BertForPreTraining(config).eval(), torch.randint(1, 50, (3, 8))
    labels, pairs = torch.where(torch.arange(8) % 3 == 0, ids, -100), torch.tensor([0, 1, 0])

    def gradients(model):
        model.zero_grad()
        model(ids, labels=labels, next_sentence_label=pairs).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = gradients(model)
    assert len(onednn) == 3 * (2 * 4 + 3)
    with fastbert.use_linear("torch"):
        theirs, truth = gradients(model), gradients(model.double())
    for (name, _), *results in zip(model.named_parameters(), ours, theirs, truth, strict=True):
        assert_close(*results, what=name, scale=1.0)


# ---- constant weights ----------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [Linear, LinearGELU])
@pytest.mark.parametrize("biased", [True, False])
def test_frozen_layers_close_to_truth(nan_filled, layer, dtype, biased):
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


@needs_onednn
def test_frozen_model_is_the_model():
    """In float32, and in bfloat16 under autocast, on padded and packed batches; the weights are gone."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=8, initializer_range=0.2,
    )  # fmt: skip
    model, ids = fastbert.BertModel(config).eval(), torch.randint(1, 50, (3, 8))
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


@needs_onednn
def test_frozen_layers_refuse_what_they_cannot_do(tmp_path):
    model = fastbert.freeze(nn.Sequential(Linear(8, 4), nn.Dropout()))
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="gives no gradients: run under"):
        model(x.requires_grad_())
    with pytest.raises(TypeError, match=r"in torch\.float32 takes x and bias of that dtype, got torch\.bfloat16"):
        model(x.detach().bfloat16())
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 8\]"):
        model(torch.randn(3, 4))
    for save in (lambda: model.state_dict(), lambda: torch.save(model[0].weight, tmp_path / "weight.pt")):
        with pytest.raises(RuntimeError, match="cannot be saved: save the model before it is frozen"):
            save()
    with pytest.raises(
        ValueError, match="Sequential has no fastbert Linear or LinearGELU layer that is not frozen yet"
    ):
        fastbert.freeze(model)


@needs_onednn
def test_a_frozen_model_is_not_half_saved(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = fastbert.freeze(fastbert.BertModel(config))
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
    monkeypatch.setattr(op, "onednn_missing", "gone")
    with pytest.raises(RuntimeError, match="cannot be frozen here: gone"):
        fastbert.freeze(model[:1])
    assert all(isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad for layer in model)
    assert model.training


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_processor_decides_where_nobody_does(monkeypatch):
    with fastbert.use_linear("auto"):
        for slow, missing, expected in [(True, None, "onednn"), (False, None, "torch"), (True, "gone", "torch")]:
            monkeypatch.setattr(op, "slow_mkl", slow)
            monkeypatch.setattr(op, "onednn_missing", missing)
            assert op.chosen() == expected
            why = "auto: AMD processor with AVX-512" if slow else "auto"
            assert f"linear products by {expected} ({why})" in op.info()


def test_the_block_decides_and_ends(monkeypatch):
    before = op.requested()
    with pytest.raises(ZeroDivisionError), fastbert.use_linear("torch"):
        assert op.chosen() == "torch"
        raise ZeroDivisionError
    assert op.requested() == before
    with pytest.raises(
        ValueError, match="'mkl': use_linear and FASTBERT_LINEAR take one of auto, torch, onednn, widened"
    ):
        fastbert.use_linear("mkl").__enter__()
    monkeypatch.setattr(op, "onednn_missing", "torch 9 has it no more")
    with pytest.raises(ValueError, match=r"torch 9 has it no more\. FASTBERT_LINEAR=torch takes torch's"):
        fastbert.use_linear("onednn").__enter__()


def test_environment_decides():
    def info(value):
        return subprocess.run(
            [sys.executable, "-c", "from fastbert.cli import main; main()", "info"],
            env=os.environ | {"FASTBERT_LINEAR": value}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert "linear products by torch (FASTBERT_LINEAR)" in info("torch").stdout
    refused = info("mkl")
    assert refused.returncode == 1 and "no library of products is called 'mkl'" in refused.stderr
    assert "Traceback" not in refused.stderr


@needs_onednn
def test_the_fastest_is_timed_and_must_be_right(monkeypatch):
    before = torch.get_rng_state()
    name, why = op.fastest(512, 256, 1024)
    assert name in ("torch", "onednn") and why.startswith("onednn took") and "torch" in why
    assert torch.equal(torch.get_rng_state(), before), "timing must leave no trace in the run's random numbers"
    assert op.fastest(512, 128, 512, torch.float32) == ("torch", "the products are small")
    product = op.onednn_linear
    monkeypatch.setattr(op, "onednn_linear", lambda *a: product(*a) * 1.001)
    assert op.fastest(512, 256, 1024) == ("torch", "onednn's results differ by more than rounding")
    monkeypatch.setattr(op, "onednn_missing", "gone")
    assert op.fastest(512, 256, 1024) == ("torch", "gone")
