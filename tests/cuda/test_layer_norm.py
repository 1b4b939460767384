"""LayerNorm's kernels for NVIDIA GPUs, emulated: every path by width, and what they ask of memory."""

import functools

import emulated_backend
import pytest
import torch
from op_cases import assert_solves, drawn, problem

from fastbert.ops import layer_norm as op
from fastbert.ops import philox

EPS = 1e-5
SEED = torch.tensor([0x123456789ABCDEF])
NAMES = ["y", "dx", "dx_bias", "dresidual", "dweight", "dbias"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (rows, columns, dtype): a path of csrc/cuda/layer_norm.cu each, with a last warp that has fewer columns than others.
# y has two uses but where float32 takes another path then.
PATHS = {
    "a warp a row": (5, 744, BF16),
    "three groups of parts": (140, 760, BF16),
    "rows again and again": (3300, 8, F16),
    "two warps a row": (3, 1048, BF16),
    "four warps a row": (2, 2056, F16),
    "one use, two warps of float32": (3, 1028, F32),
    "one use, four warps of float32": (3, 3060, F32),
    "two warps of float32": (3, 764, F32),
    "four warps of float32": (3, 1540, F32),
    "the last width in registers": (2, 4096, BF16),
    "longer than registers hold backward": (2, 4100, F32),
    "longer than registers hold": (2, 8200, BF16),
    "rows off 16 bytes": (2, 4100, BF16),
}


@functools.cache
def given(path):
    rows, columns, dtype = PATHS[path]
    generator = drawn("cuda layer_norm", path)
    x, residual, *dys = (torch.randn(rows, columns, generator=generator).mul(2).to(dtype) for _ in range(4))
    weight, bias, x_bias = (torch.randn(columns, generator=generator) for _ in range(3))
    once = path.startswith("one use")
    function = normalized_once if once else normalized
    made = problem((x, x_bias, residual, weight, bias), dys[0] if once else torch.cat(dys), function)
    if columns > 4096:  # as torch, long rows add up what was rounded
        made.baseline[2] = made.baseline[1].sum(0, dtype=F32)
    return made


def normalized(x, x_bias, residual, weight, bias):
    return torch.cat(op.dropout_add_layer_norm_twice(x, residual, weight, bias, EPS, 0.1, SEED, x_bias=x_bias))


def normalized_once(x, x_bias, residual, weight, bias):
    return op.dropout_add_layer_norm(x, residual, weight, bias, EPS, 0.1, SEED, x_bias=x_bias)


@pytest.mark.parametrize("path", PATHS)
def test_paths(module, nan_filled, path):
    assert_solves(normalized_once if path.startswith("one use") else normalized, given(path), NAMES)


def test_bits_do_not_depend_on_where_a_tensor_begins(module):
    shape = 6, 776
    aligned = [torch.randn(shape).bfloat16() for _ in range(4)]
    moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape) for x in aligned]
    weight, bias, x_bias = torch.randn(3, 776)

    def results(x, residual, *dys):
        leaves = [v.detach().requires_grad_() for v in (x, x_bias, residual, weight, bias)]
        x, x_bias_leaf, *others = leaves
        y = op.dropout_add_layer_norm_twice(x, *others, EPS, 0.1, SEED, x_bias=x_bias_leaf)
        return [*y, *torch.autograd.grad(y, leaves, dys)]

    for a, b in zip(results(*aligned), results(*moved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "weight_dtype"),
    [(48, 768, BF16, F32), (48, 768, F16, F16), (48, 768, F32, F32), (32, 1024, BF16, F32), (12, 2048, F32, F32)],
    ids=["bf16", "fp16 weights too", "float32", "two warps a row", "four warps a row"],
)
def test_rows_move_once_in_whole_sectors(traced, rows, columns, dtype, weight_dtype):
    """Weight, bias and the partial sums in scratch, which come from caches, are counted by themselves."""
    cuda, t = op.functions["cuda"], philox.threshold(0.1)
    x, residual, dy, dy2 = (torch.randn(rows, columns).to(dtype) for _ in range(4))
    weight, bias, x_bias = torch.randn(3, columns).to(weight_dtype)
    tensor = x.numel() * x.element_size()

    def moved(kernels):
        accesses, traffic = traced.library.accesses(), traced.library.traffic()
        assert {row.kernel for row in accesses} == {kernels}
        assert all(row.cost == row.ideal for row in accesses), traced.library.table()
        cached = {"weight", "bias", "x_bias", "scratch", "dweight", "dbias", "dx_bias"}
        return traffic, sum(moved for (name, _), moved in traffic.items() if name not in cached)

    _, z, mean, rstd = cuda.layer_norm_forward(x, x_bias, residual, weight, bias, EPS, t, SEED)
    traffic, total = moved("layer_norm_forward")
    for name in (("x", "read"), ("residual", "read"), ("y", "write"), ("z", "write")):
        assert traffic[name] == tensor
    assert total <= 1.1 * 4 * tensor

    cuda.layer_norm_backward(dy, dy2, z, weight, mean, rstd, t, SEED, True)
    traffic, total = moved("layer_norm_backward")
    for name in (("dy", "read"), ("dy2", "read"), ("z", "read"), ("dz", "write"), ("dx", "write")):
        assert traffic[name] == tensor
    assert total <= 1.1 * 5 * tensor
    scratch = 4 * traced.layer_norm_scratch(rows, columns, True)
    assert traffic["scratch", "read"] == traffic["scratch", "write"] <= scratch


def test_one_kernel_gives_all_gradients(monkeypatch):
    """The last block adds up the parts of the others."""
    monkeypatch.setattr(emulated_backend, "EVERY_ORDER", 0)
    emulated = emulated_backend.module(trace=False)
    x, weight = torch.randn(2, 200, 768).bfloat16(), torch.randn(768)
    with emulated_backend.installed(emulated), emulated.library.listing() as launches:
        op.functions["cuda"].layer_norm_backward(*x, x[0], weight, *torch.rand(2, 200), 0, None, True)
    assert launches == [("layer_norm_backward", 50)]


def test_y_alone_writes_nothing_else(traced):
    x, residual = torch.randn(2, 8, 768).bfloat16()
    op.functions["cuda"].layer_norm(x, None, residual, torch.ones(768), torch.zeros(768), EPS, 0, None)
    assert {name for name, access in traced.library.traffic() if access == "write"} == {"y"}


def test_scratch_is_small():
    """The partial sums of 5,120 rows of 768 are a twentieth of dy, z, dz and dx."""
    module = emulated_backend.module(trace=False)
    assert module.layer_norm_scratch(5120, 768, False) * 4 < 5120 * 768 * 2 * 4 / 19
    assert module.layer_norm_scratch(10, 700, False) == 2 * 10 * 704 + 22  # and counters of 700 / 32 blocks
    assert module.layer_norm_scratch(10, 700, True) == 3 * 10 * 704 + 22


@pytest.mark.parametrize(("rows", "columns"), [(1, 2**28 + 1), (2**31, 1)], ids=["columns", "rows"])
def test_more_than_can_be_counted_is_refused(rows, columns):
    module = emulated_backend.module(trace=False)
    with pytest.raises(RuntimeError, match=rf"layer_norm_forward: at most .* got \[{rows}, {columns}\]"):
        module.compiled.layer_norm_forward(*[0] * 5, 1e-5, 0, *[0] * 5, rows, columns, 0, 0, 0)
