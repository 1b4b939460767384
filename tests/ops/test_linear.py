"""Linear layers' products by each library: against float64, the choice of one, its bounds."""

import os
import re
import subprocess
import sys

import pytest
import torch
from bert_batches import SMALL
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fastbert
from fastbert.backends import linear as kernels
from fastbert.backends import linear_product, native
from fastbert.ops.linear import functions
from fastbert.ops.linear_timing import fastest, settle
from fastbert.testing import assert_close, run

# Where each library's products can be watched.
PRODUCTS = {"onednn": (kernels, "onednn_product"), "fastbert": (linear_product, "linear_product")}


@pytest.fixture
def products(library, monkeypatch):
    """That library for products of every size, and the shapes of those it computes."""
    seen, product = [], getattr(*PRODUCTS[library])

    def counted(x, weight, *others):
        seen.append((*x.shape, weight.shape[0]))
        return product(x, weight, *others)

    monkeypatch.setattr(kernels, "SMALL", dict.fromkeys(kernels.SMALL, 1))
    monkeypatch.setattr(*PRODUCTS[library], counted)
    return seen


# x, N
SHAPES = [((1, 1), 1), ((3, 5), 7), ((8,), 4), ((2, 3, 8), 5), ((2, 1, 3, 16), 33), ((65, 64), 48), ((77, 96), 301)]


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_close_to_truth(library, products, nan_filled, shape, out, biased, dtype):
    inputs = [torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out) if biased else None]
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    dy = torch.randn(*shape[:-1], out, dtype=dtype)
    ours, theirs = (run(f, inputs, dy) for f in (fastbert.linear, F.linear))
    truth = run(F.linear, [None if x is None else x.double() for x in inputs], dy.double())
    for name, *results in zip(("y", "dx", "dweight", "dbias"), ours, theirs, truth, strict=False):
        assert_close(*results, what=name, scale=shape[-1] ** 0.5)
    backward_too = dtype == torch.float32 or not kernels.bfloat16_products or library == "fastbert"
    assert len(products) == (3 if backward_too else 1), "not every product was the library's"


@pytest.fixture
def widened(monkeypatch):
    monkeypatch.setattr(kernels, "SMALL", dict.fromkeys(kernels.SMALL, 1))
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
    assert kernels.chosen(torch.float32) == "torch" and kernels.chosen(torch.bfloat16) == "widened"


def test_a_processor_without_bfloat16_products_widens(monkeypatch):
    monkeypatch.setattr(kernels, "bfloat16_products", False)
    monkeypatch.setattr(kernels, "slow_libraries", False)
    with fastbert.use_linear("auto"):
        assert kernels.chosen(torch.bfloat16) == "widened" and kernels.chosen(torch.float32) != "widened"
        assert "no bfloat16 products: they are computed as float32 products" in kernels.info()
    with fastbert.use_linear("torch"):
        assert kernels.chosen(torch.bfloat16) == "torch"
        assert "many times slower than float32" in kernels.info()
    assert fastest(512, 768, 768, torch.bfloat16)[0] != "torch"


@pytest.mark.parametrize(("shape", "out"), [((0, 8), 5), ((4, 0), 5), ((4, 8), 0), ((2, 0, 8), 5)], ids=str)
def test_nothing_to_multiply_is_left_to_torch(products, shape, out):
    inputs = torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)
    dy = torch.randn(*shape[:-1], out)
    for ours, theirs in zip(run(fastbert.linear, inputs, dy), run(F.linear, inputs, dy), strict=True):
        assert torch.equal(ours, theirs)
    assert products == []


def test_any_strides(products):
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
    assert len(products) == 18


def test_what_transposes_moves_words_of_four_bytes(library):
    """Inputs of two go another way."""
    x, weight = torch.randn(1024, 512).bfloat16().t(), torch.randn(512, 1024).bfloat16()
    assert_close(fastbert.linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double()))
    with pytest.raises(TypeError, match=r"float32, got torch\.bfloat16"):
        linear_product.transposed(x.t())


@pytest.mark.parametrize(
    "wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 0)], ids=str
)
def test_only_the_gradients_that_are_wanted(products, wanted):
    inputs = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)
    for x, w in zip(inputs, wanted, strict=True):
        x.requires_grad_(bool(w))
    y = fastbert.linear(*inputs)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.square().sum().backward()
    assert [x.grad is not None for x in inputs] == [bool(w) for w in wanted]
    assert len(products) == 1 + wanted[0] + wanted[1]


def test_frozen_weights_keep_no_input(products):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        fastbert.linear(x, weight)
    assert saved == [weight.shape]


def test_the_twin_is_the_formula():
    """Against torch's own derivatives in float64; what is not wanted stays empty."""
    x, weight, bias, dy = (torch.randn(shape).double() for shape in ((6, 8), (5, 8), (5,), (6, 5)))
    twin = functions["reference"]
    y, dx, dweight, dbias = run(F.linear, (x, weight, bias), dy)
    torch.testing.assert_close(twin.linear_forward(x, weight, bias, "widened"), y)
    whole = twin.linear_backward(dy, x, weight, torch.float64, torch.float64, "widened")
    for ours, theirs in zip(whole, (dx, dweight, dbias), strict=True):
        torch.testing.assert_close(ours, theirs)
    nothing = twin.linear_backward(dy, None, None, torch.float64, None, "widened")
    assert [result.numel() for result in nothing] == [0, 0, 0]


def test_a_weight_used_twice_adds_its_gradients(products):
    x, weight = torch.randn(6, 8), torch.randn(8, 8)
    dy = torch.randn(6, 8)

    def twice(linear):
        return lambda x, w: linear(linear(x, w).tanh(), w)

    ours, theirs = run(twice(fastbert.linear), (x, weight), dy), run(twice(F.linear), (x, weight), dy)
    truth = run(twice(F.linear), (x.double(), weight.double()), dy.double())
    for results in zip(ours, theirs, truth, strict=True):
        assert_close(*results, scale=8)


def test_a_gradient_of_a_gradient_is_refused(products):
    """It would be silently wrong if the op let it pass."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(fastbert.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_keeps_to_the_library_of_its_forward(products):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    y = fastbert.linear(x, weight)
    with fastbert.use_linear("torch"):
        z = fastbert.linear(x, weight)
        y.sum().backward()
    assert len(products) == 3
    z.sum().backward()
    assert len(products) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_torch(products, dtype):
    x, weight, bias = torch.randn(4, 8).to(dtype), torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype)
    assert torch.equal(fastbert.linear(x, weight, bias), F.linear(x, weight, bias)) and products == []


def test_autocast(library, products):
    """bfloat16 whatever the inputs are, and gradients in their own dtypes: as torch's autocast."""
    dy = torch.randn(4, 5).bfloat16()
    rounded = kernels.bfloat16_products and library == "onednn"
    for kinds in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16,) * 3):
        inputs = [
            x.to(kind) for x, kind in zip((torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)), kinds, strict=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(fastbert.linear, inputs, dy), run(F.linear, inputs, dy)
        assert [x.dtype for x in ours] == [torch.bfloat16, *kinds]
        used = [x.bfloat16() for x in inputs] if rounded else [inputs[0].bfloat16(), *inputs[1:]]
        truth = run(F.linear, [x.double() for x in used], dy.double())
        for results in zip(ours, theirs, truth, strict=True):
            assert_close(*(x.bfloat16() for x in results[:2]), results[2], scale=8)
    assert len(products) == (3 if rounded else 9)


def test_other_autocast_and_other_devices_are_torch(products):
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.float16):
        y = fastbert.linear(x, weight)
        assert y.dtype == torch.float16 and torch.equal(y, F.linear(x, weight))
    assert fastbert.linear(x.to("meta"), weight.to("meta")).shape == (4, 5)
    assert products == []


def test_small_products_are_torch(library):
    least = kernels.SMALL[library, torch.float32] // 2**18
    x, small, large = (torch.randn(n, 512) for n in (512, least - 1, least))
    assert type(fastbert.linear(x, small.requires_grad_()).grad_fn).__name__ != "_LinearBackward"
    assert type(fastbert.linear(x, large.requires_grad_()).grad_fn).__name__ == "_LinearBackward"


def test_what_does_not_fit_gets_torchs_message(products):
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    for inputs, what in (((x.tolist(), weight), "list"), ((x, weight.numpy()), "ndarray"), ((x, weight, 1.0), "float")):
        with pytest.raises(TypeError, match=f"must be Tensor, not (numpy.)?{what}"):
            fastbert.linear(*inputs)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 7))
    with pytest.raises(RuntimeError, match="size"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 8), torch.randn(4))
    with pytest.raises(RuntimeError, match="dtype"):
        fastbert.linear(torch.randn(4, 8), torch.randn(5, 8, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_compiled_equals_eager(library, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(kernels, "SMALL", dict.fromkeys(kernels.SMALL, 1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastbert.linear, fullgraph=True, backend=counter)
    for rows in (12, 40, 56):
        inputs, dy = (torch.randn(rows, 24), torch.randn(16, 24), torch.randn(16)), torch.randn(rows, 16)
        assert type(fastbert.linear(inputs[0], inputs[1].requires_grad_()).grad_fn).__name__ == "_LinearBackward"
        for ours, eager in zip(run(compiled, inputs, dy), run(fastbert.linear, inputs, dy), strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 2


def test_every_product_of_the_model(products):
    """Of two layers four each, then pooler, masked word head and decoder; forward and both gradients."""
    model, ids = fastbert.BertForPreTraining(SMALL).eval(), torch.randint(1, 50, (3, 8))
    labels, pairs = torch.where(torch.arange(8) % 3 == 0, ids, -100), torch.tensor([0, 1, 0])

    def gradients(model):
        model.zero_grad()
        model(ids, labels=labels, next_sentence_label=pairs).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = gradients(model)
    assert len(products) == 3 * (2 * 4 + 3)
    with fastbert.use_linear("torch"):
        theirs, truth = gradients(model), gradients(model.double())
    for (name, _), *results in zip(model.named_parameters(), ours, theirs, truth, strict=True):
        assert_close(*results, what=name, scale=1.0)


# ---- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slow_mkl", "slow_libraries", "missing", "expected", "why"),
    [
        (True, False, None, "onednn", "auto: AMD processor with AVX-512"),
        (True, False, "gone", "torch", "auto: AMD processor with AVX-512"),
        (False, True, None, "fastbert", "auto: AMD processor without AVX-512"),
        (False, False, None, "torch", "auto"),
    ],
)
def test_the_processor_decides_where_nobody_does(monkeypatch, slow_mkl, slow_libraries, missing, expected, why):
    monkeypatch.setattr(kernels, "slow_mkl", slow_mkl)
    monkeypatch.setattr(kernels, "slow_libraries", slow_libraries)
    monkeypatch.setattr(kernels, "onednn_missing", missing)
    with fastbert.use_linear("auto"):
        assert kernels.chosen() == expected and f"linear products by {expected} ({why})" in kernels.info()
        with fastbert.use_backend("reference"):
            assert kernels.chosen() == ("torch" if slow_libraries else expected)


def test_the_block_decides_and_ends(monkeypatch):
    before = kernels.requested()
    with pytest.raises(ZeroDivisionError), fastbert.use_linear("torch"):
        assert kernels.chosen() == "torch"
        raise ZeroDivisionError
    assert kernels.requested() == before
    with pytest.raises(
        ValueError, match="'mkl': use_linear and FASTBERT_LINEAR take one of auto, torch, onednn, widened, fastbert"
    ):
        fastbert.use_linear("mkl").__enter__()
    monkeypatch.setattr(kernels, "onednn_missing", "torch 9 has it no more")
    with pytest.raises(ValueError, match=r"torch 9 has it no more\. FASTBERT_LINEAR=torch takes torch's"):
        fastbert.use_linear("onednn").__enter__()
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "cpu_missing", "it was not built")
    with pytest.raises(ValueError, match="by 'fastbert' were asked for and cannot run here: it was not built"):
        fastbert.use_linear("fastbert").__enter__()


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


def test_near_ties_settle_by_a_fixed_order():
    assert settle({"torch": 10.0, "onednn": 9.5, "fastbert": 9.2}, usual="torch") == "torch"
    assert settle({"torch": 10.0, "onednn": 9.5, "fastbert": 9.2}, usual="fastbert") == "fastbert"
    assert settle({"torch": 10.3, "onednn": 9.5, "fastbert": 9.2}, usual="torch") == "onednn"
    assert settle({"torch": 10.0, "onednn": 4.7, "fastbert": 9.0}, usual="torch") == "onednn"
    assert settle({"widened": 10.0, "fastbert": 9.2}, usual="widened") == "widened"


def test_the_fastest_is_timed_and_must_be_right(monkeypatch):
    before = torch.get_rng_state()
    missing = {"onednn": kernels.onednn_missing, "fastbert": native.cpu_missing}
    names = [name for name, why_not in missing.items() if not why_not]
    name, why = fastest(512, 256, 1024)
    milliseconds = dict(re.findall(r"(\w+) took (\d+\.\d) ms", why))
    milliseconds = {name: float(taken) for name, taken in milliseconds.items()}
    assert list(milliseconds) == ["torch", *names]
    assert milliseconds[name] <= 1.1 * min(milliseconds.values()) + 0.1, "the words are rounded"
    assert torch.equal(torch.get_rng_state(), before), "timing must leave no trace in the run's random numbers"
    nothing = " is small, or no other library is there"
    assert fastest(64, 128, 512, torch.float32) == ("torch", f"64 x 128 x 512{nothing}")
    for name in names:
        product = getattr(*PRODUCTS[name])
        wrong = lambda *arguments, product=product: product(*arguments) * 1.001  # noqa: E731
        monkeypatch.setattr(*PRODUCTS[name], wrong)
    name, why = fastest(512, 256, 1024)
    assert name == "torch" and why.split(", ")[1:] == [f"{name} differs by more than rounding" for name in names]
    monkeypatch.setattr(kernels, "onednn_missing", "gone")
    with fastbert.use_backend("reference"):
        assert fastest(512, 256, 1024) == ("torch", f"512 x 256 x 1024{nothing}")
    monkeypatch.setattr(native, "cpu_missing", "gone")
    assert fastest(512, 256, 1024) == ("torch", f"512 x 256 x 1024{nothing}")
