"""Shapes drawn at random: every op on every instruction set against its twin.

`make sanitize` runs this file and the op tests with kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch:
then a kernel that reads or writes one place too far ends the process.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastbert
from fastbert.backends import linear_product, requested, triton
from fastbert.ops.lazy_adam import GRAD_BY_ROW, lazy_adam_step
from fastbert.ops.lazy_adam_replay import lazy_adam_replay
from fastbert.testing import assert_close, run

SEED = torch.tensor([77])
DRAWN = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
COLUMNS = st.one_of(st.integers(1, 70), st.integers(1, 1100))


@pytest.fixture
def backend(backend):
    if backend == "reference":
        pytest.skip("the twin, which the others are compared with")
    return backend


def agree(function, inputs, shape, terms=None):
    """Asserts that outputs and gradients of `function` are the twin's, as close to float64 as the twin is.

    `terms(place, dy)`: size of the terms of result `place`; 1 unless given, as inputs are N(0, 1).
    """
    dy = torch.randn(shape)
    ours = run(function, inputs, dy)
    dy = dy.to(ours[0].dtype)  # what flowed back, rounded
    with fastbert.use_backend("reference"):
        twin = run(function, inputs, dy)
        truth = run(function, [None if x is None else x.double() for x in inputs], dy.double())
    for place, results in enumerate(zip(ours, twin, truth, strict=True)):
        if results[0].numel():
            assert_close(*results, what=f"result {place}", scale=1.0 if terms is None else terms(place, dy))


@given(rows=st.integers(0, 70), columns=COLUMNS, dtype=DTYPES, biased=st.booleans(), tanh=st.booleans())
@DRAWN
def test_gelu(backend, rows, columns, dtype, biased, tanh):
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(columns) if biased else None

    def terms(place, dy):
        # In 16 bits the derivative is computed to 4e-5, about their last place, and dbias is a float32 sum of it: 20
        # of float32's tolerances for every unit of dy. (torch sums what it has rounded to 16 bits.)
        is_short_sum = place == 2 and dtype != torch.float32
        return max(1.0, 20 * dy.abs().sum(0).max().item()) if is_short_sum else 1.0

    agree(lambda x, b: fastbert.gelu(x, b, "tanh" if tanh else "none"), (x, bias), x.shape, terms)


@given(
    rows=st.integers(0, 70), columns=COLUMNS, dtype=DTYPES, added=st.booleans(), p=st.sampled_from([0.0, 0.1, 1.0])
)  # fmt: skip
@DRAWN
def test_layer_norm(backend, rows, columns, dtype, added, p):
    x, residual = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    inputs = x, residual if added else None, torch.randn(columns), torch.randn(columns)
    # eps: in a row of two nearly equal numbers the truth hangs on the last digit of their difference
    agree(lambda *a: fastbert.dropout_add_layer_norm(*a, eps=0.1, dropout_p=p, seed=SEED), inputs, x.shape)


@given(rows=st.integers(0, 9), columns=st.one_of(COLUMNS, st.integers(4000, 9000)), dtype=DTYPES)
@DRAWN
def test_cross_entropy(backend, rows, columns, dtype):
    labels = torch.randint(-1, columns, (rows,))  # -1 is ignored; first and last columns come up often enough
    labels[:2] = torch.tensor([0, columns - 1])[:rows]
    x = torch.randn(rows, columns).to(dtype)
    agree(lambda x: fastbert.cross_entropy(x, labels, -1, "none"), (x,), (rows,))


@given(
    lengths=st.lists(st.integers(0, 70), max_size=5), heads=st.integers(1, 3), head_dim=st.integers(1, 70),
    dtype=DTYPES, packed=st.booleans(), causal=st.booleans(), p=st.sampled_from([0.0, 0.1, 1.0]),
    window=st.none() | st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
)  # fmt: skip
@DRAWN
def test_attention(backend, lengths, heads, head_dim, dtype, packed, causal, p, window):
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = torch.randn(tokens, 3, heads, head_dim).to(dtype)
    options = {"dropout_p": p, "seed": SEED, "causal": causal, "window": window}

    def attention(q, k, v):
        return fastbert.attention(q, k, v, cu_seqlens, max(lengths, default=0), **options)

    inputs = (qkv,) if packed else [x.clone() for x in qkv.unbind(1)]
    agree((lambda x: attention(*x.unbind(1))) if packed else attention, inputs, (tokens, heads, head_dim))


@given(
    rows=st.integers(1, 60), columns=COLUMNS, touched=st.integers(0, 90), dtype=DTYPES,
    kind=st.sampled_from(["sparse", "by row", "dense"]), amsgrad=st.booleans(),
)  # fmt: skip
@DRAWN
def test_lazy_adam(backend, rows, columns, touched, dtype, kind, amsgrad):
    state = [torch.randn(rows, columns).to(dtype), torch.randn(rows, columns), torch.rand(rows, columns)]
    state += [torch.rand(rows, columns) if amsgrad else None, None]
    ids = None if kind == "dense" else torch.randint(rows, (touched,))
    grad = torch.randn(touched if kind == "sparse" else rows, columns).to(dtype)
    flags = GRAD_BY_ROW if kind == "by row" else 0

    def step(wide):
        tables = [x if x is None else x.double() if wide else x.clone() for x in state]
        rate, number = torch.tensor(0.01, dtype=torch.float64), torch.tensor(3.0)
        options = None, 0.9, 0.999, 1e-8, 0.1, flags, -1, 0, None, None, None, requested()
        lazy_adam_step(*tables, ids, grad.double() if wide else grad, rate, number, *options)
        return tables[:4]

    ours = step(wide=False)
    with fastbert.use_backend("reference"):
        twin, truth = step(wide=False), step(wide=True)
    for name, *results in zip(("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ours, twin, truth, strict=True):
        if results[0] is not None:
            assert_close(*results, what=name, scale=1.0)


@given(rows=st.integers(1, 60), columns=COLUMNS, named=st.none() | st.integers(0, 90), steps=st.integers(1, 300))
@DRAWN
def test_lazy_adam_replay(backend, rows, columns, named, steps):
    if backend == "triton" and triton.interpreted:
        pytest.skip("interpreted it takes a minute; tests/ops/test_lazy_adam_replay.py has chosen cases")
    state = [torch.randn(rows, columns), torch.randn(rows, columns), torch.rand(rows, columns)]
    last = torch.randint(0, steps + 1, (rows,), dtype=torch.int32)
    ids = None if named is None else torch.randint(rows, (named,))
    lr, decay = torch.full((steps,), 1e-3).double(), torch.full((steps,), 0.1).double()

    def replay(wide):
        tables = [x.double() if wide else x.clone() for x in state]
        lazy_adam_replay(*tables, last.clone(), ids, lr, decay, steps, 0.9, 0.999, 1e-8, 0, -1, requested())
        return tables

    ours = replay(wide=False)
    with fastbert.use_backend("reference"):
        twin, truth = replay(wide=False), replay(wide=True)
    for name, *results in zip(("param", "exp_avg", "exp_avg_sq"), ours, twin, truth, strict=True):
        assert_close(*results, what=name, scale=1.0)


@given(rows=st.integers(0, 150), columns=st.integers(1, 150), behind=st.integers(0, 3))
@DRAWN
def test_transposed(backend, rows, columns, behind):
    wider = torch.randn(rows, columns + behind)
    x = wider[:, :columns]
    result = linear_product.transposed(x)
    assert result.is_contiguous() and torch.equal(result, x.t())


@pytest.mark.skipif(os.environ.get("FASTBERT_SANITIZE") != "1", reason="for make sanitize")
def test_the_sanitizer_watches():
    code = (
        "import torch; from fastbert.backends import native; x, y = torch.zeros(16), torch.zeros(15)\n"
        "native.module.gelu_forward(x.data_ptr(), 0, 0, y.data_ptr(), 1, 16, 0, 0, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr[-2000:]
