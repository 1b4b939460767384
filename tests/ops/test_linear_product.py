"""The kernel of csrc/cpu/linear.cpp: against float64, on every instruction set, in every order of memory and dtype."""

import functools
import resource
import threading
from pathlib import Path

import pytest
import torch
from op_cases import assert_same_for_threads, drawn
from torch import Tensor
from torch.nn import functional as F

from fastbert.backends import linear_product as kernel
from fastbert.backends import native
from fastbert.testing import assert_close

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.cpu_missing))

# M, K, N
SMALL = {
    "one of each": (1, 1, 1),
    "less than a tile": (3, 5, 7),
    "a tile": (6, 16, 16),
    "one more than a tile": (7, 17, 65),
    "groups of rows and five": (101, 30, 9),
}
BLOCKS = {
    "several tasks, blocks of depth and of columns": (97, 385, 401),
    "columns beyond a task": (50, 130, 900),
    "depth beyond what is packed at a time": (5, 1540, 40),
}
CASES = SMALL | BLOCKS | {"rows beyond a chunk": (5290, 1537, 17)}
ORDERS = ["rows", "columns", "neither"]
DTYPES = [torch.float32, torch.bfloat16]


def operands(m: int, k: int, n: int, order: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] and bias [N]; the matrices along their rows, along their columns, or neither."""
    generator = drawn("linear_product", m, k, n)

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator)
        if order == "columns":
            return values.t().contiguous().t()
        return values if order == "rows" else F.pad(values, (0, 1)).repeat_interleave(2, 1)[:, : 2 * columns : 2]

    return matrix(m, k), matrix(n, k), torch.randn(n, generator=generator)


@functools.cache
def judged(case: str) -> list[tuple[bool, Tensor, Tensor]]:
    """Whether there is a bias, and torch's result and the truth, for operands in any order of memory."""
    inputs = operands(*CASES[case])
    results = []
    for given in (inputs, (*inputs[:2], None)):
        truth = F.linear(*(None if t is None else t.double() for t in given))
        results.append((given[2] is not None, F.linear(*given), truth))
    return results


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32,
    judged: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    y = kernel.linear_product(x, weight, bias, dtype)
    widened, truth = judged or (
        F.linear(*(None if t is None else t.to(kind) for t in (x, weight, bias)))
        for kind in (torch.float32, torch.float64)
    )
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, widened.to(dtype), truth, scale=x.shape[1] ** 0.5)
    if dtype == torch.float32:
        rounded = kernel.linear_product(x, weight, bias, torch.bfloat16)
        assert torch.equal(rounded, y.bfloat16()), "not rounded once"
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(kernels, nan_filled, case, order):
    x, weight, bias = operands(*CASES[case], order)
    for biased, *results in judged(case):
        check(x, weight, bias if biased else None, judged=results)


@functools.cache
def mixed(x_dtype, weight_dtype, case, order):
    x, weight, bias = operands(*CASES[case], order)
    given = x.to(x_dtype), weight.to(weight_dtype), bias.to(weight_dtype)
    assert given[0].stride() == x.stride()
    return given, [F.linear(*(t.to(kind) for t in given)) for kind in (torch.float32, torch.float64)]


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_dtypes(kernels, nan_filled, x_dtype, weight_dtype):
    """Each for itself; the bias in the weight's. A product deeper than what is packed at a time is rounded once."""
    for case in ("one more than a tile", "depth beyond what is packed at a time"):
        for order in ("rows", "columns"):
            given, results = mixed(x_dtype, weight_dtype, case, order)
            check(*given, judged=results)


@pytest.mark.parametrize("case", ["one more than a tile", *BLOCKS])
def test_the_number_of_threads_changes_no_bit(kernels, case):
    inputs = operands(*CASES[case])
    assert_same_for_threads(lambda: [kernel.linear_product(*inputs, torch.float32)], (1, 2, 3, 7))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_packed_weights_give_the_same_bits(kernels, nan_filled, order, weight_dtype):
    for case in SMALL | BLOCKS:
        x, weight, bias = operands(*CASES[case], order)
        weight = weight.to(weight_dtype)
        packed = kernel.linear_packed(weight)
        ours = kernel.linear_product(x, packed, bias, torch.float32, tuple(weight.shape))
        assert torch.equal(ours, kernel.linear_product(x, weight, bias, torch.float32)), case


def test_what_is_not_finite_stays_in_its_row(kernels):
    """Row 7 too, which is read together with rows 0 to 5."""
    x, weight, bias = operands(20, 50, 40)
    x[3, 7], x[5, 0], x[7, 49] = torch.nan, torch.inf, -torch.inf
    y = kernel.linear_product(x, weight, bias, torch.float32)
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
            thread = threading.Thread(target=kernel.linear_product, args=(*inputs, torch.float32))
            thread.start()
            thread.join()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert sizes[2] - sizes[1] < 10 * 2**20, [size >> 20 for size in sizes]  # 27 MB, if they left theirs


def test_overlapping_and_expanded_operands(kernels):
    check(torch.randn(1, 24).expand(9, 24), torch.randn(7, 1).expand(7, 24), torch.randn(1).expand(7))
    check(torch.randn(40).as_strided((9, 24), (1, 1)), torch.randn(7, 24), torch.randn(14)[::2])
