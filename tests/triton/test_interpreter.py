"""The interpreter that Triton's kernels are tested by: what it computes in bfloat16, and that no address escapes it."""

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

import triton.language as tl  # noqa: E402


@pytest.fixture(autouse=True)
def installed():
    with interpreter.installed():
        yield


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, less_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a * b)
    tl.store(out_ptr + 2 * N + i, a / b)
    tl.store(out_ptr + 3 * N + i, -a)
    tl.store(out_ptr + 4 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 5 * N + i, tl.where(a < b, a, b))
    tl.store(out_ptr + 6 * N + i, tl.fma(a, b, a))
    tl.store(out_ptr + 7 * N + i, a.to(tl.float16))
    tl.store(less_ptr + i, a < b)


def test_bfloat16_is_computed_with_and_not_its_bits():
    a, b = torch.randn(2, 256).bfloat16()
    out, less = torch.empty(8, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bool)
    arithmetic[(1,)](a, b, out, less, N=256)
    x, y = a.float(), b.float()
    expected = (x + y, x * y, x / y, -x, x.maximum(y), x.minimum(y), x * y + x, a.half())
    for ours, truth in zip(out, expected, strict=True):
        assert torch.equal(ours, truth.bfloat16())
    assert torch.equal(less, x < y)


@triton.jit
def cast(x_ptr, out_ptr, back_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))
    tl.store(back_ptr + i, tl.load(out_ptr + i).to(tl.float32))


def test_float32_is_rounded_to_the_nearest():
    """Every upper half of a float32, each with the four lower halves where rounding changes."""
    upper = torch.arange(1 << 16).unsqueeze(1) << 16
    bits = (upper + torch.tensor([0, 0x7FFF, 0x8000, 0x8001])).flatten()
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    out, back = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    cast[(1,)](x, out, back, N=len(x))
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back[~x.isnan()], out.float()[~x.isnan()])


@triton.jit
def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_add_up_in_float32(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


@triton.jit
def total(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def test_reductions_of_bfloat16_are_refused():
    with pytest.raises(NotImplementedError, match="a reduction of bfloat16"):
        total[(1,)](torch.ones(16).bfloat16(), torch.empty(1), N=16)


@triton.jit
def copy(source_ptr, target_ptr, size, N: tl.constexpr, M: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < size, other=0), mask=i < M)


def test_addresses_out_of_bounds_name_the_tensor_and_the_place():
    source, target = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    copy[(2,)](source, target, 100, N=64, M=100)
    assert torch.equal(source, target)
    # Of the 28 those are not counted that happen to lie in the other argument.
    with pytest.raises(
        IndexError, match=r"a load out of bounds, \d+ of 64: 800 bytes from the first of source_ptr, which "
    ):
        copy[(2,)](source, target, 128, N=64, M=100)
    with pytest.raises(IndexError, match=r"a store out of bounds, 1 of 37: 800 bytes from the first of target_ptr"):
        copy[(2,)](source, target, 100, N=64, M=101)


@triton.jit
def by_table(table_ptr, out_ptr):
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(x_ptr + 1))


def test_a_table_holds_addresses_that_were_asked_for():
    x, out = torch.tensor([1.0, 5.0]), torch.empty(1)
    by_table[(1,)](torch.tensor([x.data_ptr()]), out)
    assert out.item() == 5.0
    with pytest.raises(IndexError, match="a load out of bounds, 1 of 1"):
        by_table[(1,)](torch.tensor([x.data_ptr() + 8]), out)


def test_a_launch_of_too_many_programs_skips():
    with interpreter.installed(most=1), pytest.raises(pytest.skip.Exception, match="a launch of 2 programs"):
        copy[(2,)](torch.arange(4), torch.arange(4), 4, N=2, M=4)
