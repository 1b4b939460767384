"""Intrinsics and PTX against what CUDA's manuals say of them, worked out with Python's integers and matrices."""

import pytest
import torch
from emulated import InOut, Output


def test_warp_intrinsics(emulate, trace, order):
    x = torch.tensor([lane * 7 % 5 for lane in range(32)], dtype=torch.int32)
    y = torch.full((19, 32), -1, dtype=torch.int32)
    emulate("intrinsics.cu", trace).run("warp_intrinsics", order=order, x=x, y=Output(y))
    v, lanes = x.tolist(), range(32)
    xor = 0
    for value in v:
        xor ^= value
    expected = [
        [v[5]] * 32,
        [v[lane // 8 * 8 + 1] for lane in lanes],
        [v[lane - 3] if lane >= 3 else v[lane] for lane in lanes],
        [v[lane + 2] if lane % 16 < 14 else v[lane] for lane in lanes],
        [v[lane ^ 4] for lane in lanes],
        [sum(1 << lane for lane in lanes if v[lane] > 0)] * 32,
        [0] * 32,
        [1] * 32,
        [sum(1 << other for other in lanes if v[other] == v[lane]) for lane in lanes],
        [sum(v)] * 32,
        [0] * 32,
        [4] * 32,
        [xor] * 32,
        [sum(value > 0 for value in v)] * 32,
        [0] * 32,
        [1] * 32,
        [0x66553300] * 32,
        [(0xDEADBEEF * 0x12345678) >> 32] * 32,
        [0xFFFF0000] * 32,
    ]
    assert [[value & 0xFFFFFFFF for value in row] for row in y.tolist()] == expected


def test_atomics(emulate, trace, order):
    x = torch.arange(3, 35, dtype=torch.int32)
    y = torch.tensor([10, 0, 9, 9, 0, 0, 5, 0, 0], dtype=torch.int32)
    emulate("intrinsics.cu", trace).run("atomics", order=order, x=x, y=InOut(y))
    total = sum(range(3, 35))
    assert y.tolist() == [10 + total, -total, 3, 34, -1, 32 % 10, 5 + total, 3, 12]


def test_tf32_product(emulate, trace, order):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.full((16, 8), float("nan"))
    emulate("intrinsics.cu", trace).run("tf32_product", order=order, a=a, b=b, c=Output(c))
    a, b = ((x.view(torch.int32) & -0x2000).view(torch.float32).double() for x in (a, b))  # 19 bits are read
    torch.testing.assert_close(c.double(), a @ b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_transposed_ldmatrix(emulate, trace, order, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.full((16, 16), float("nan"))
    launcher = "transposed_bf16" if dtype == torch.bfloat16 else "transposed_fp16"
    emulate("intrinsics.cu", trace).run(launcher, order=order, a=a, b=b, c=Output(c))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
