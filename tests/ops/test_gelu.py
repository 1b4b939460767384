import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert.testing import assert_close, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (3, 5), (7, 16), (2, 33), (65, 64), (4, 3, 768), (300, 1024)]
FORMS = ["none", "tanh"]


def torch_gelu(x, bias, approximate):
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_truth(backend, nan_filled, shape, dtype, approximate):
    x, dy = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    for bias in (None, torch.randn(shape[-1]), torch.randn(shape[-1]).to(dtype)):
        ours = run(lambda x, b: fastbert.gelu(x, b, approximate), (x, bias), dy)
        theirs = run(lambda x, b: torch_gelu(x, b, approximate), (x, bias), dy)
        wide = None if bias is None else bias.double()
        with fastbert.use_backend("reference"):
            truth = run(lambda x, b: fastbert.gelu(x, b, approximate), (x.double(), wide), dy.double())
        for name, *results in zip(("y", "dx", "dbias"), ours, theirs, truth, strict=False):
            if results[0].numel():
                assert_close(*results, what=name)
        assert ours[0].dtype == dtype and ours[1].dtype == dtype
        assert bias is None or ours[2].dtype == bias.dtype


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(backend, threads, dtype):
    x, dy, bias = torch.randn(200, 768).to(dtype), torch.randn(200, 768), torch.randn(768)
    ours = run(lambda x, b: fastbert.gelu(x, b), (x, bias), dy)
    again = run(lambda x, b: fastbert.gelu(x, b), (x, bias), dy)
    torch.set_num_threads(1)
    alone = run(lambda x, b: fastbert.gelu(x, b), (x, bias), dy)
    for a, b, c in zip(ours, again, alone, strict=True):
        assert torch.equal(a, b)
        assert backend == "reference" or torch.equal(a, c)


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
