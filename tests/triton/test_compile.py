"""The backend triton under torch.compile(fullgraph=True): eager against compiled, through the interpreter."""

import interpreter
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastbert
from fastbert import ops
from fastbert.backends import why_not
from fastbert.testing import run

if torch.cuda.is_available() or why_not("triton"):
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

SEED = torch.tensor([99])
WEIGHT, BIAS = torch.linspace(0.5, 1.5, 16), torch.linspace(-1.0, 1.0, 16)


@pytest.fixture(autouse=True)
def installed():
    with interpreter.installed():
        yield


def layer(x, w, cu_seqlens):
    """All ops; `backend=` is read by the compiler, where a block would not be."""
    x = fastbert.gelu(x @ w, BIAS, backend="triton")
    qkv = torch.stack([x, x, x], 1).view(-1, 3, 1, 16)
    x = x + fastbert.attention_qkv(qkv, cu_seqlens, 64, dropout_p=0.1, seed=SEED, backend="triton").flatten(1)
    x = fastbert.dropout_add_layer_norm(x, x * 2, WEIGHT, BIAS, 1e-5, 0.1, SEED, backend="triton")
    x = fastbert.dropout(x, 0.1, SEED, backend="triton")
    return fastbert.cross_entropy(x, torch.arange(len(x)) % 16, backend="triton")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nested)])
def test_one_graph_for_any_number_of_tokens(compiler):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (12, 20, 28) if compiler == "aot_eager" else (12,):
        cu_seqlens = torch.tensor([0, 5, tokens], dtype=torch.int32)
        inputs, dy = (torch.randn(tokens, 16), torch.randn(16, 16)), torch.ones(())
        results = run(lambda *a, bounds=cu_seqlens: compiled(*a, bounds), inputs, dy)
        expected = run(lambda *a, bounds=cu_seqlens: layer(*a, bounds), inputs, dy)
        for ours, eager in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 2


def calls(dtype):
    """Of every op that a graph can hold, forward and backward, its arguments."""
    x, residual, weight = torch.randn(3, 24).to(dtype), torch.randn(3, 24).to(dtype), torch.ones(24)
    rows, labels = torch.ones(3), torch.tensor([1, 2, 0])
    q, k, v = torch.randn(3, 3, 2, 16).to(dtype).unbind(1)
    out, lse = torch.randn(3, 2, 16).to(dtype), torch.zeros(2, 3)
    cu_seqlens, how = torch.tensor([0, 3], dtype=torch.int32), (4, 0.25, 26, SEED, False, None)
    yield "gelu_forward", (x, weight, "none")
    yield "gelu_backward", (x, x, weight, "tanh")
    yield "layer_norm", (x, weight, residual, weight, weight, 1e-5, 6554, SEED)
    yield "layer_norm_forward", (x, None, None, weight, weight, 1e-5, 0, None)
    yield "layer_norm_forward", (x, weight, residual, weight, weight, 1e-5, 6554, SEED)
    yield "layer_norm_backward", (x, None, x, weight, rows, rows, 0, None, False)
    yield "layer_norm_backward", (x, x, x, weight, rows, rows, 6554, SEED, True)
    yield "dropout", (x.T, 6554, SEED)
    looked_up = x, x, x, None, labels, labels, None, None
    yield "embedding_norm_forward", (*looked_up, weight, weight, 1e-5, 6554, SEED, dtype)
    yield "embedding_norm_recompute", (x[labels], *looked_up, 6554, SEED)
    yield "embedding_norm_recompute", (x[labels], *looked_up, 0, None)
    yield "cross_entropy_forward", (x, labels, -100, "mean")
    yield "cross_entropy_backward", (rows, x, labels, rows, rows, None, -100)
    yield "attention_forward", (q, k, v, cu_seqlens, *how)
    yield "attention_backward", (out, q, k, v, out, lse, cu_seqlens, *how)
    best, how = torch.zeros(2, 3, dtype=torch.int32), (4, 0.25, 0.5, SEED, False, None)
    yield "hard_attention_forward", (q, k, v, cu_seqlens, *how)
    yield "hard_attention_backward", (out, q, k, v, best, lse, cu_seqlens, *how)
    yield "attention_distillation", (q, k, out, out, cu_seqlens, 4)


def described(results):
    results = [results] if isinstance(results, torch.Tensor) else results
    return [(x.dtype, list(x.shape), x.stride()) for x in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_compiler_is_told_is_what_kernels_give(dtype):
    seen = set()
    for name, arguments in calls(dtype):
        op = getattr(torch.ops.fastbert_triton, name).default
        with FakeTensorMode() as mode:
            told = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        assert described(told) == described(op(*arguments)), name
        seen.add(name)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastbert_triton::")}
    assert {f"fastbert_triton::{name}" for name in seen} == registered


def test_a_function_follows_the_block_it_is_called_in():
    x = torch.randn(3, 8, requires_grad=True)
    with fastbert.use_backend("triton"):
        y = fastbert.gelu(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y.sum().backward()  # on the backend of its forward pass, outside of the block
    assert "fastbert_triton::gelu_backward" in {event.name for event in profiler.events()}
    assert set(ops.gelu.functions) == {"reference", "cpu", "cuda", "triton"}
