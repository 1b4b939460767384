import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

import fastbert
from fastbert.testing import run

CASES = {
    "nothing": (0, 8),
    "one element": (1, 1),
    "a tail alone": (3, 5),
    "vectors, a tail, four rows and three": (7, 81),
    "four vectors together": (2, 133),
    "several axes, several chunks of rows": (4, 18, 40),
    "columns of two tiles": (5, 4099),
}
FORMS = ["none", "tanh"]


def torch_gelu(x, bias, approximate):
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


@functools.cache
def cases(case, dtype):
    """(form, dtype of the bias, problem) for both forms, without a bias, and with one of each dtype."""
    shape, made = CASES[case], []
    generator = drawn("gelu", case, dtype)
    for form in FORMS:
        for bias_dtype in (None, *dict.fromkeys((torch.float32, dtype))):
            x, dy = (torch.randn(shape, generator=generator).mul(3).to(dtype) for _ in range(2))
            bias = bias_dtype and torch.randn(shape[-1], generator=generator).to(bias_dtype)
            functions = (lambda x, b, f=f, form=form: f(x, b, form) for f in (fastbert.gelu, torch_gelu))
            made.append((form, bias_dtype, problem((x, bias), dy, *functions)))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, nan_filled, case, dtype):
    for form, bias_dtype, given in cases(case, dtype):
        names = ("y", "dx") if bias_dtype is None else ("y", "dx", "dbias")
        results = assert_solves(lambda x, b, form=form: fastbert.gelu(x, b, form), given, names)
        assert [x.dtype for x in results] == [dtype, dtype, bias_dtype][: len(names)]


@pytest.mark.parametrize("approximate", FORMS)
def test_truth_agrees_with_torch_where_torch_does_not_cancel(approximate):
    x = torch.linspace(-6, 8, 1001, dtype=torch.float64)
    ours = run(lambda x: fastbert.gelu(x, None, approximate), (x,), torch.ones_like(x))
    theirs = run(lambda x: F.gelu(x, approximate=approximate), (x,), torch.ones_like(x))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("approximate", FORMS)
def test_reference_gradients(approximate):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: fastbert.gelu(x, b, approximate), (x, bias))


def test_relative_error_in_the_tail(backend):
    x = torch.cat([torch.linspace(-13, 13, 1 << 16), -torch.logspace(-30, 1, 1000)])
    x = x[x != 0]
    wide = x.double()
    truth = 0.5 * wide * torch.erfc(-wide / 2**0.5)
    error = ((fastbert.gelu(x).double() - truth) / truth).abs().max().item()
    # The twin goes through float32's erfc, whose argument's rounding costs x * x ulp; the kernels split the square.
    assert error < (1e-6 if backend == "cpu" else 2e-5), error


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(backend, dtype, approximate):
    big = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, big, -big, 0.0, -0.0, torch.finfo(dtype).tiny, 100.0, -100.0])
    y, dx = run(lambda x: fastbert.gelu(x, None, approximate), (x.to(dtype),), torch.ones(10))
    assert y[0] == torch.inf and y[1] == 0 and y[2].isnan() and y[3] == x.to(dtype)[3]
    assert y[4] == y[5] == y[6] == y[9] == 0 and y[8] == 100
    assert dx[2].isnan()
    expected = [1, 0, None, 1, 0, 0.5, 0.5, 0.5, 1, 0]
    for value, result in zip(expected, dx.tolist(), strict=True):
        assert value is None or result == pytest.approx(value, abs=1e-6)


def test_not_contiguous(backend):
    x = torch.randn(64, 48).T
    dy = torch.randn(48, 64)
    a, b = (run(lambda x: fastbert.gelu(x), (each,), dy) for each in (x, x.contiguous()))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_bits_do_not_depend_on_threads(kernels):
    """Threads share chunks of rows with a bias, tiles of columns without."""
    x, dy, bias = torch.randn(100, 400), torch.randn(100, 400), torch.randn(400)
    for some in (bias, None):
        assert_same_for_threads(lambda some=some: run(fastbert.gelu, (x, some), dy))


def test_autocast_computes_in_its_dtype():
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fastbert.gelu(x, torch.zeros(8))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_bad_input():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="approximate must be 'none'"):
        fastbert.gelu(x, approximate="sigmoid")
    with pytest.raises(ValueError, match=r"bias must have shape \[8\]"):
        fastbert.gelu(x, torch.zeros(7))
    with pytest.raises(TypeError, match="float32 or x's dtype"):
        fastbert.gelu(x, torch.zeros(8, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        fastbert.gelu(torch.zeros(4, dtype=torch.int64))
    for form in (None, 1):
        with pytest.raises(ValueError, match="approximate must be 'none'"):
            fastbert.gelu(x, approximate=form)
    for name in (5, 0, ""):
        with pytest.raises(ValueError, match=f"no backend is called {name!r}: expected one of reference"):
            fastbert.gelu(x, backend=name)
    for given, what in (([1.0], "list"), (x.numpy(), "numpy.ndarray"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"x must be a torch\.Tensor, got {what}; torch\.as_tensor makes one"):
            fastbert.gelu(given)
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got float"):
        fastbert.gelu(x, 1.0)
    with pytest.raises(TypeError, match=r"got torch\.float8_e4m3fn"):
        fastbert.gelu(x.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="N >= 1"):
        fastbert.gelu(torch.zeros(()))
