"""The demonstration kernels give the right numbers in every order of threads, and the trace finds nothing in them."""

from pathlib import Path

import pybind11
import pytest
import torch
from emulated import KernelError, Output, extension


def nan(*shape):
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize("rows, columns", [(1, 4), (3, 500), (5, 1024)])
def test_row_sum(emulate, trace, order, rows, columns):
    x, y = torch.randn(rows, columns), nan(rows)
    emulate("demo.cu", trace).run("row_sum", order=order, x=x, y=Output(y), rows=rows, columns=columns)
    torch.testing.assert_close(y.double(), x.double().sum(1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("rows, columns", [(1, 1), (32, 32), (70, 45)])
def test_transpose(emulate, trace, order, rows, columns):
    x, y = torch.randn(rows, columns), nan(columns, rows)
    emulate("demo.cu", trace).run("transpose", order=order, x=x, y=Output(y), rows=rows, columns=columns)
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("m, n, k", [(32, 32, 32), (1, 2, 8), (45, 34, 104)])
def test_matmul(emulate, trace, order, dtype, m, n, k):
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), nan(m, n)
    launcher = "matmul_bf16" if dtype == torch.bfloat16 else "matmul_fp16"
    emulate("demo.cu", trace).run(launcher, order=order, a=a, b=b, c=Output(c), m=m, n=n, k=k)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_every_access_is_as_good_as_can_be(emulate):
    """Where rows are whole sectors no access to global memory takes more than its ideal, and no bank is asked twice."""
    library = emulate("demo.cu", True)
    x, y = torch.randn(64, 64), nan(64, 64)
    tables = []
    library.run("transpose", x=x, y=Output(y), rows=64, columns=64)
    tables += library.accesses()
    library.run("row_sum", x=x, y=Output(nan(64)), rows=64, columns=64)
    tables += library.accesses()
    a = torch.randn(64, 64).bfloat16()
    library.run("matmul_bf16", a=a, b=a.clone(), c=Output(y), m=64, n=64, k=64)
    tables += library.accesses()
    assert {(row.kernel, row.memory) for row in tables} == {
        *[("transpose", memory) for memory in ("x", "y", "shared")],
        *[("row_sum", memory) for memory in ("x", "y", "shared")],
        *[("matmul", memory) for memory in ("a", "b", "c", "shared")],
    }
    assert all(row.cost == row.ideal for row in tables), library.table()


def test_the_table_counts_what_a_kernel_reads(emulate):
    """Every block sampled: 64 x 64 floats are 512 sectors of 32 bytes, 4 to a warp's request."""
    library = emulate("demo.cu", True)
    library.run("transpose", sample=4, x=torch.randn(64, 64), y=Output(nan(64, 64)), rows=64, columns=64)
    read = next(row for row in library.accesses() if row.memory == "x")
    assert (read.access, read.bytes, read.requests, read.lanes, read.cost, read.ideal) == (
        "read",
        4,
        128,
        4096,
        512,
        512,
    )
    assert library.traffic() == {("x", "read"): 64 * 64 * 4, ("y", "write"): 64 * 64 * 4}
    assert library.table().splitlines()[1].split()[:4] == ["transpose", read.line, "read", "x"]


def test_bindings_call_the_same_kernels(emulate, trace):
    """As the package's module does, built by g++: addresses as integers, and an exception where a launch fails."""
    library = emulate("demo.cu", trace)
    module = extension("demo", Path(__file__).with_name("demo_bindings.cpp"), library, [f"-I{pybind11.get_include()}"])
    x, y = torch.randn(3, 8), nan(3)
    library.start(order="reverse")
    module.row_sum(library.watch("x", x), library.watch("y", Output(y)), 3, 8)
    torch.testing.assert_close(y, x.sum(1))
    with pytest.raises(RuntimeError, match="row_sum: launch limits: kernel row_sum asks for a grid of"):
        module.row_sum(x.data_ptr(), y.data_ptr(), 0, 8)
    with pytest.raises(KernelError, match="launch limits"):
        library.check()
