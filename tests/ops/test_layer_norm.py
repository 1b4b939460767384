import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

import fastbert
from fastbert.ops import layer_norm as op
from fastbert.ops import philox
from fastbert.testing import assert_close, run

CASES = {
    "nothing": (0, 8),
    "one column": (1, 1),
    "a tail alone": (3, 5),
    "vectors and a tail": (7, 81),
    "blocks and a tail": (2, 700),
    "several chunks of rows": (2, 35, 24),
    "chunks of more than 32 rows": (2100, 21),
    "more columns than are drawn at a time": (3, 1500),
    "a long row": (2, 20000),
}
# With x_bias or not, with a residual or not, p, and whether y has two uses. Without a residual p = 1 would normalise
# zeros, where any rounding is blown up by 1/sqrt(eps).
WAYS = [
    (False, False, 0.0, False), (False, False, 0.1, True), (True, False, 0.0, True), (False, True, 0.0, False),
    (True, True, 0.1, True), (True, True, 1.0, False),
]  # fmt: skip
EPS = 1e-5
SEED = torch.tensor([0x123456789ABCDEF])


def torch_layer_norm(x, x_bias, residual, weight, bias, p, twice=False):
    """PyTorch's own ops in x's dtype, with our mask; both uses of y one above the other."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if p:
        row = torch.arange(x.numel() // x.shape[-1]).unsqueeze(-1)
        keep = philox.lanes(x.shape[-1], row, 0, 0, SEED) >= philox.threshold(p)
        x = x * keep.view(x.shape) * philox.scale(philox.threshold(p))
    if residual is not None:
        x = x + residual
    y = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)
    return torch.cat([y, y]) if twice else y


def ours_layer_norm(x, x_bias, residual, weight, bias, p, twice=False):
    given = x, residual, weight, bias, EPS, p, SEED
    if twice:
        return torch.cat(op.dropout_add_layer_norm_twice(*given, x_bias=x_bias))
    return fastbert.dropout_add_layer_norm(*given, x_bias=x_bias)


@functools.cache
def cases(case, dtype):
    """(way, weight's dtype, size of terms, names of the results, problem) of every way and dtype of the parameters."""
    shape, made = CASES[case], []
    generator = drawn("layer_norm", case, dtype)
    for with_x_bias, with_residual, *way in WAYS:
        for weight_dtype in dict.fromkeys((torch.float32, dtype)):
            uses = [torch.randn(shape, generator=generator).mul(2).to(dtype) for _ in range(4)]
            x, residual, dy = uses[0], uses[1], torch.cat(uses[2:]) if way[-1] else uses[2]
            weight, bias, x_bias = (torch.randn(shape[-1], generator=generator).to(weight_dtype) for _ in range(3))
            functions = (lambda *a, f=f, way=way: f(*a, *way) for f in (ours_layer_norm, torch_layer_norm))
            inputs = x, x_bias if with_x_bias else None, residual if with_residual else None, weight, bias
            given = problem(inputs, dy, *functions)
            # dx is a difference of terms of this size; with one column the difference is 0.
            term = (dy * weight).abs().max().item() * EPS**-0.5 if shape[-1] == 1 else 1e-30
            names = ["y", "dx", *["dx_bias"] * with_x_bias, *["dresidual"] * with_residual, "dweight", "dbias"]
            made.append((way, weight_dtype, term, names, given))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, nan_filled, case, dtype):
    for way, weight_dtype, term, names, given in cases(case, dtype):
        results = assert_solves(lambda *a, way=way: ours_layer_norm(*a, *way), given, names, term)
        assert results[0].dtype == results[1].dtype == dtype
        assert results[-1].dtype == results[-2].dtype == weight_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_alone_is_the_y_of_training(backend, dtype):
    """Where no derivative is wanted nothing else is written."""
    x, residual = torch.randn(2, 5, 300).to(dtype)
    weight, bias, x_bias = torch.randn(3, 300)
    for *added, p in ((None, None, 0.0), (x_bias, None, 0.0), (None, residual, 0.3), (x_bias, residual, 0.3)):
        alone = ours_layer_norm(x, *added, weight, bias, p)
        assert torch.equal(alone, ours_layer_norm(x, *added, weight.clone().requires_grad_(), bias, p))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_gradients_of_two_uses_are_added(backend, used):
    """A use without a gradient adds nothing, as where a result is not looked at."""
    x, residual, *dys = torch.randn(4, 6, 40)
    inputs = x, torch.randn(40), residual, torch.randn(40), torch.randn(40)
    leaves = [v.clone().requires_grad_() for v in inputs]
    x, x_bias, residual, weight, bias = leaves
    y = op.dropout_add_layer_norm_twice(x, residual, weight, bias, EPS, 0.1, SEED, x_bias=x_bias)
    assert y[0].data_ptr() == y[1].data_ptr() and y[0].grad_fn is y[1].grad_fn is not None
    both = torch.autograd.grad([y[i] for i in used], leaves, [dys[i] for i in used])
    once = run(lambda *a: ours_layer_norm(*a, 0.1), inputs, sum(dys[i] for i in used))
    assert torch.equal(y[0], once[0])
    for ours, expected in zip(both, once[1:], strict=True):
        assert torch.equal(ours, expected)


def test_a_frozen_x_bias_takes_no_gradient(backend):
    x, x_bias = torch.randn(3, 24, requires_grad=True), torch.randn(24)
    y = fastbert.dropout_add_layer_norm(x, None, torch.ones(24), torch.zeros(24), x_bias=x_bias)
    y.sum().backward()
    assert torch.equal(y, fastbert.layer_norm(x + x_bias, torch.ones(24), torch.zeros(24)))


def test_by_hand(backend):
    # Mean 2, variance 1 (population), so the row becomes -1, 1, -1, 1; then * 2 + 1.
    x = torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    y = fastbert.layer_norm(x, torch.full((4,), 2.0), torch.ones(4), eps=0.0)
    assert y.tolist() == [[-1.0, 3.0, -1.0, 3.0]]


def test_reference_gradients():
    x, residual = (torch.randn(3, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x_bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for twice in (False, True):
        given = x, x_bias, residual, weight, bias
        assert torch.autograd.gradcheck(lambda *a, twice=twice: ours_layer_norm(*a, 0.3, twice), given)
    assert torch.autograd.gradcheck(lambda x, w, b: fastbert.layer_norm(x, w, b, EPS), (x, weight, bias))


@pytest.mark.parametrize(
    ("shape", "p"), [((5, 3), 0.5), ((130, 64), 0.9), ((4, 2057), 0.1)], ids=["a tail", "many rows", "many columns"]
)
def test_mask_is_the_contracts(backend, shape, p):
    """z shows the mask: every backend drops the elements whose lane lies below t, the same in backward."""
    x, weight, bias = torch.ones(shape), torch.ones(shape[-1]), torch.zeros(shape[-1])
    t = philox.threshold(p)
    keep = philox.lanes(shape[-1], torch.arange(shape[0]).unsqueeze(-1), 0, 0, SEED) >= t
    raw = op.functions[backend]
    _, z, mean, rstd = raw.layer_norm_forward(x, None, None, weight, bias, EPS, t, SEED)
    torch.testing.assert_close(z, keep * philox.scale(t))
    _, dx, *_ = raw.layer_norm_backward(torch.randn(shape), None, z, weight, mean, rstd, t, SEED, False)
    assert torch.equal(dx != 0, keep)
    assert abs(keep.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5


def test_dropped_elements_may_hold_anything(backend):
    x = torch.full((8, 64), torch.nan)
    residual = torch.randn(8, 64)
    x_bias = torch.full((64,), torch.inf)
    y, dx, dx_bias, dresidual, *_ = run(
        lambda *a: ours_layer_norm(*a, 1.0), (x, x_bias, residual, torch.ones(64), torch.zeros(64)), torch.randn(8, 64)
    )
    assert torch.equal(dx_bias, torch.zeros(64))
    torch.testing.assert_close(y, F.layer_norm(residual, (64,), eps=EPS))
    assert torch.equal(dx, torch.zeros_like(dx)) and dresidual.isfinite().all()


def test_extreme_values(backend):
    row = torch.randn(4, 40)
    row[1, 3] = torch.nan
    row[2, 5] = torch.inf
    row[3] *= 1e-42  # subnormal
    y = fastbert.layer_norm(row, torch.ones(40), torch.zeros(40))
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()
    large = 1e6 + torch.arange(40.0).unsqueeze(0)  # a large mean must not swallow the variance
    truth = F.layer_norm(large.double(), (40,), eps=1e-12)
    theirs = F.layer_norm(large, (40,), eps=1e-12)
    assert_close(fastbert.layer_norm(large, torch.ones(40), torch.zeros(40)), theirs, truth)


def test_not_contiguous(backend):
    weight, bias = torch.randn(48), torch.randn(48)
    x, residual, dy = torch.randn(48, 64).T, torch.randn(64, 96)[:, ::2], torch.randn(48, 64).T
    x_bias = torch.randn(96)[::2]
    a = run(lambda *a: ours_layer_norm(*a, 0.1), (x, x_bias, residual, weight, bias), dy)
    given = x.contiguous(), x_bias.contiguous(), residual.contiguous(), weight, bias
    b = run(lambda *a: ours_layer_norm(*a, 0.1), given, dy.contiguous())
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_bits_do_not_depend_on_threads(kernels):
    inputs = torch.randn(100, 400), torch.randn(400), torch.randn(100, 400), torch.randn(400), torch.randn(400)
    dy = torch.randn(200, 400)
    assert_same_for_threads(lambda: run(lambda *a: ours_layer_norm(*a, 0.1, True), inputs, dy))


def test_a_drawn_seed_follows_manual_seed():
    x, weight, bias = torch.randn(8, 32), torch.ones(32), torch.zeros(32)

    def draw():
        return fastbert.dropout_add_layer_norm(x, None, weight, bias, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


@pytest.mark.parametrize("seed", [7, -1, 2**63 + 5, 2**64 - 1])
def test_an_int_is_a_seed(seed):
    x, weight, bias = torch.randn(8, 32), torch.ones(32), torch.zeros(32)
    low = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    a, b = (fastbert.dropout_add_layer_norm(x, None, weight, bias, dropout_p=0.5, seed=s) for s in (seed, low))
    assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_single_row_needs_no_leading_axis(backend, p):
    x, weight, bias, dy = torch.randn(4, 24)
    alone, inside = (
        run(lambda *a: ours_layer_norm(*a, p), (f(x), None, None, weight, bias), f(dy))
        for f in (lambda v: v, torch.atleast_2d)
    )
    for a, b in zip(alone, inside, strict=True):
        torch.testing.assert_close(a, b.view(a.shape))


def test_autocast_computes_in_its_dtype():
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fastbert.dropout_add_layer_norm(x, torch.randn(4, 8), torch.ones(8), torch.zeros(8))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_bad_input():
    x, weight = torch.randn(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must have shape \[8\]"):
        fastbert.layer_norm(x, torch.ones(4), weight)
    with pytest.raises(TypeError, match="one dtype"):
        fastbert.layer_norm(x.bfloat16(), weight, weight.bfloat16())
    with pytest.raises(ValueError, match=r"residual must have x's shape \[4, 8\]"):
        fastbert.dropout_add_layer_norm(x, torch.randn(1, 8), weight, weight)
    with pytest.raises(ValueError, match=r"x_bias must have shape \[8\], the last axis of x, got \[4\]"):
        fastbert.dropout_add_layer_norm(x, None, weight, weight, x_bias=torch.ones(4))
    with pytest.raises(TypeError, match=r"x_bias must be float32 or x's dtype torch\.float32, got torch\.float16"):
        fastbert.dropout_add_layer_norm(x, None, weight, weight, x_bias=weight.half())
    for p in (2, -0.1, float("nan")):
        with pytest.raises(ValueError, match="0 <= dropout_p <= 1"):
            fastbert.dropout_add_layer_norm(x, None, weight, weight, dropout_p=p)
    for p in ("x", True, None, torch.tensor(0.1)):
        with pytest.raises(TypeError, match="dropout_p must be a number, got "):
            fastbert.dropout_add_layer_norm(x, None, weight, weight, dropout_p=p)
    for eps in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps is added to the variance: expected a finite number of at least 0"):
            fastbert.layer_norm(x, weight, weight, eps)
    with pytest.raises(TypeError, match="eps must be a number, got NoneType None"):
        fastbert.layer_norm(x, weight, weight, None)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got NoneType"):
        fastbert.layer_norm(x, None, weight)
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got numpy\.ndarray"):
        fastbert.dropout_add_layer_norm(x, x.numpy(), weight, weight)
    with pytest.raises(TypeError, match=r"residual must be a floating tensor, .* got torch\.int64"):
        fastbert.dropout_add_layer_norm(x, x.long(), weight, weight)
    for seed in (1.0, True, "1"):
        with pytest.raises(TypeError, match="seed must be an int, got "):
            fastbert.dropout_add_layer_norm(x, None, weight, weight, dropout_p=0.5, seed=seed)
    with pytest.raises(ValueError, match=r"seed must lie in \[-2\*\*63, 2\*\*64\)"):
        fastbert.dropout_add_layer_norm(x, None, weight, weight, dropout_p=0.5, seed=2**64)
    with pytest.raises(ValueError, match="seed must be an int64"):
        fastbert.dropout_add_layer_norm(
            x, None, weight, weight, dropout_p=0.5, seed=torch.tensor([1], dtype=torch.int32)
        )


def test_a_nan_of_ones_is_rounded_to_a_nan(backend):
    """float32 whose bits are all ones: rounding to bfloat16 must not carry it over into 0."""
    bias = torch.full((24,), -1, dtype=torch.int32).view(torch.float32)
    assert fastbert.layer_norm(torch.randn(4, 24).bfloat16(), torch.ones(24), bias).isnan().all()
