"""The kernel of csrc/cpu/linear.cpp: against float64, on every instruction set, in every order of memory and dtype."""

import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.backends import linear_product, native
from fastbert.testing import assert_close

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.cpu_missing))
isas = native.module.instruction_sets() if native.module else []
on_every_isa = pytest.mark.parametrize("backend", [f"cpu:{isa}" for isa in isas], indirect=True)

# M, K, N: one of each; less than a tile, a tile, one more in each way; several blocks of rows, of depth, of columns
SMALL = [(1, 1, 1), (3, 5, 7), (6, 16, 16), (7, 17, 65), (13, 40, 31), (101, 30, 9)]
LARGE = [(97, 385, 401), (200, 130, 900), (5, 1540, 40), (5290, 1537, 17)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(m: int, k: int, n: int, order: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] and bias [N]; the matrices along their rows, along their columns, or neither."""

    def matrix(rows: int, columns: int) -> Tensor:
        if order == "columns":
            return torch.randn(columns, rows).t()
        return torch.randn(rows, columns) if order == "rows" else torch.randn(rows + 1, 2 * columns)[1:, ::2]

    return matrix(m, k), matrix(n, k), torch.randn(n)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    y = linear_product.linear_product(x, weight, bias, dtype)
    widened, truth = (
        F.linear(*(None if t is None else t.to(kind) for t in (x, weight, bias)))
        for kind in (torch.float32, torch.float64)
    )
    assert y.dtype == dtype and y.is_contiguous()
    if dtype == torch.bfloat16:
        unrounded = linear_product.linear_product(x, weight, bias, torch.float32)
        assert torch.equal(y, unrounded.bfloat16()), "not rounded once"
    assert_close(y, widened.to(dtype), truth, scale=x.shape[1] ** 0.5)
    return y


@on_every_isa
@pytest.mark.parametrize("order", ["rows", "columns", "neither"])
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_close_to_truth(backend, nan_filled, shape, order):
    x, weight, bias = operands(*shape, order)
    check(x, weight, bias)
    check(x, weight, None)
    check(x, weight, bias, torch.bfloat16)


@on_every_isa
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, nan_filled, x_dtype, weight_dtype, dtype):
    """Each for itself; the bias in the weight's. A product deeper than what is packed at a time is rounded once."""
    for shape in [(7, 17, 65), (3, 1540, 40)]:
        for order in ("rows", "columns"):
            x, weight, bias = operands(*shape, order)
            x, weight = x.to(x_dtype), weight.to(weight_dtype)
            assert x.stride() == operands(*shape, order)[0].stride()
            check(x, weight, bias.to(weight_dtype), dtype)


@on_every_isa
@pytest.mark.parametrize("shape", [(7, 17, 65), (97, 385, 401), (300, 40, 100), (5290, 770, 17)], ids=str)
def test_the_number_of_threads_changes_no_bit(backend, shape):
    inputs, before = operands(*shape), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(linear_product.linear_product(*inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@on_every_isa
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["rows", "columns", "neither"])
def test_packed_weights_give_the_same_bits(backend, nan_filled, order, weight_dtype):
    for shape in SMALL + LARGE[:3]:
        x, weight, bias = operands(*shape, order)
        weight = weight.to(weight_dtype)
        packed = linear_product.linear_packed(weight)
        ours = linear_product.linear_product(x, packed, bias, torch.float32, tuple(weight.shape))
        assert torch.equal(ours, linear_product.linear_product(x, weight, bias, torch.float32))


@on_every_isa
def test_what_is_not_finite_stays_in_its_row(backend):
    """Row 7 too, which is read together with rows 0 to 5."""
    x, weight, bias = operands(20, 50, 40)
    x[3, 7], x[5, 0], x[7, 49] = torch.nan, torch.inf, -torch.inf
    y = linear_product.linear_product(x, weight, bias, torch.float32)
    rows = torch.arange(20)[:, None].expand(20, 40)
    assert torch.equal(~y.isfinite(), (rows == 3) | (rows == 5) | (rows == 7))
    assert y[3].isnan().all() and torch.equal(y[5], weight[:, 0].sign() * torch.inf)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=str)
def test_nothing_to_multiply_is_refused(shape):
    with pytest.raises(ValueError, match="all at least 1"):
        check(*operands(*shape))


def test_memory_goes_with_its_thread():
    """Of a thread that the caller started, as of those that OpenMP ends."""
    inputs, sizes = operands(240, 768, 768), []
    for _ in range(3):
        for _ in range(10):
            thread = threading.Thread(target=linear_product.linear_product, args=(*inputs, torch.float32))
            thread.start()
            thread.join()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert sizes[2] - sizes[1] < 10 * 2**20, [size >> 20 for size in sizes]  # 27 MB, if they left theirs


@on_every_isa
def test_overlapping_and_expanded_operands(backend):
    check(torch.randn(1, 24).expand(9, 24), torch.randn(7, 1).expand(7, 24), torch.randn(1).expand(7))
    check(torch.randn(40).as_strided((9, 24), (1, 1)), torch.randn(7, 24), torch.randn(14)[::2])
