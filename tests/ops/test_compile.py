"""Public functions under torch.compile(fullgraph=True): same outputs and gradients as eager, our own grad_fn, and no
third compilation for a second shape. The raw ops' opcheck does not see the autograd.Function; this does."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastbert
from fastbert.ops.layer_norm import dropout_add_layer_norm_twice
from fastbert.testing import run

SEED = torch.tensor([99])
BEST = next(name for name in reversed(fastbert.backends()) if name != "triton")  # tests/triton/test_compile.py has that


def case_gelu(n):
    return lambda x, b: fastbert.gelu(x, b), (torch.randn(n, 24), torch.randn(24)), (n, 24)


def case_layer_norm(n):
    return lambda x, w, b: fastbert.layer_norm(x, w, b), (torch.randn(n, 24), torch.randn(24), torch.randn(24)), (n, 24)


def case_dropout_add_layer_norm(n):
    inputs = torch.randn(n, 24), torch.randn(n, 24), torch.randn(24), torch.randn(24)
    return lambda *a: fastbert.dropout_add_layer_norm(*a, dropout_p=0.1, seed=SEED), inputs, (n, 24)


def case_dropout_add_layer_norm_twice(n):
    inputs = torch.randn(n, 24), torch.randn(24), torch.randn(n, 24), torch.randn(24), torch.randn(24)

    def function(x, x_bias, residual, *parameters):
        y, y2 = dropout_add_layer_norm_twice(x, residual, *parameters, dropout_p=0.1, seed=SEED, x_bias=x_bias)
        return y * 3 + y2.square()

    return function, inputs, (n, 24)


def case_one_use_of_two(n):
    _, *others = case_dropout_add_layer_norm(n)
    return lambda *a: dropout_add_layer_norm_twice(*a, dropout_p=0.1, seed=SEED)[1] * 2, *others


def case_cross_entropy(n):
    return lambda x: fastbert.cross_entropy(x, torch.arange(len(x)) % 25 - 1, -1), (torch.randn(n, 24),), ()


def case_attention(n, p=0.1):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)

    def function(qkv, cu_seqlens=cu_seqlens):
        return fastbert.attention(*qkv.unbind(1), cu_seqlens, 64, dropout_p=p, seed=SEED)

    return function, (torch.randn(n, 3, 2, 8),), (n, 2, 8)


def case_attention_without_dropout(n):
    return case_attention(n, p=0.0)


def case_attention_qkv(n):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)

    def function(qkv, cu_seqlens=cu_seqlens):
        return fastbert.attention_qkv(qkv, cu_seqlens, 64, dropout_p=0.1, seed=SEED)

    return function, (torch.randn(n, 3, 2, 8),), (n, 2, 8)


def case_hard_attention(n):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)

    def function(qkv, cu_seqlens=cu_seqlens):
        return fastbert.hard_attention(*qkv.unbind(1), cu_seqlens, 64, gumbel=True, seed=SEED)

    return function, (torch.randn(n, 3, 2, 8),), (n, 2, 8)


def case_attention_distillation(n):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)

    def function(qkv, cu_seqlens=cu_seqlens):
        q, k, teacher = qkv.unbind(1)
        return fastbert.attention_distillation(q, k, teacher, teacher, cu_seqlens, 64)

    return function, (torch.randn(n, 3, 2, 8),), ()


CASES = [
    case_gelu, case_layer_norm, case_dropout_add_layer_norm, case_dropout_add_layer_norm_twice, case_one_use_of_two,
    case_cross_entropy, case_attention, case_attention_qkv, case_hard_attention, case_attention_distillation,
]  # fmt: skip
# The others are parts of these; tracing the rounds of random numbers once is enough.
TWINS = [case_gelu, case_dropout_add_layer_norm_twice, case_cross_entropy, case_attention_without_dropout]


def compiled_equals_eager(case, backend, dtype, compiler, **options):
    """For three shapes; returns the number of compilations."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(case(12)[0], fullgraph=True, backend=counter, **options)
    for n in (12, 40, 56):
        function, inputs, shape = case(n)
        inputs, dy = [x.to(dtype) for x in inputs], torch.randn(shape)
        chosen = compiled if "attention" not in case.__name__ else _with_bounds(compiled, n)
        with fastbert.use_backend(backend):
            for ours, eager in zip(run(chosen, inputs, dy), run(function, inputs, dy), strict=True):
                torch.testing.assert_close(ours, eager)
    return counter.frame_count


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_once_and_for_any_other_shape(case):
    assert compiled_equals_eager(case, BEST, torch.float32, "aot_eager") <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("case", TWINS)
def test_twins_compile_for_any_shape(case):
    """They are traced, op by op, not opaque: so is what they do with shapes."""
    assert compiled_equals_eager(case, "reference", torch.bfloat16, "aot_eager", dynamic=True) <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_all_in_one_graph_by_inductor():
    """The compiler that writes code around the ops."""
    weight, bias, cu_seqlens = torch.ones(16), torch.zeros(16), torch.tensor([0, 5, 12], dtype=torch.int32)

    def layer(x, w):
        x = fastbert.gelu(x @ w, bias)
        x = x + fastbert.attention_qkv(torch.stack([x, x, x], 1).view(-1, 3, 2, 8), cu_seqlens, 64).flatten(1)
        x = fastbert.dropout_add_layer_norm(x, x * 2, weight, bias, dropout_p=0.1, seed=SEED)
        return fastbert.cross_entropy(x, torch.arange(len(x)))

    torch.compiler.reset()
    inputs = torch.randn(12, 16), torch.randn(16, 16)
    compiled = torch.compile(layer, fullgraph=True)
    for ours, eager in zip(run(compiled, inputs, torch.ones(())), run(layer, inputs, torch.ones(())), strict=True):
        torch.testing.assert_close(ours, eager)


def _with_bounds(compiled, n):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)
    return lambda qkv: compiled(qkv, cu_seqlens)


def test_grad_fn_is_ours():
    x = torch.randn(4, 8, requires_grad=True)
    assert type(fastbert.gelu(x).grad_fn).__name__ == "_GeluBackward"
    assert type(fastbert.layer_norm(x, torch.ones(8), torch.zeros(8)).grad_fn).__name__ == "_LayerNormBackward"
    loss = fastbert.cross_entropy(x, torch.zeros(4, dtype=torch.int64), reduction="none")
    assert type(loss.grad_fn).__name__ == "_CrossEntropyBackward"
    qkv = x.view(4, 1, 8)
    out = fastbert.attention(qkv, qkv, qkv, torch.tensor([0, 4], dtype=torch.int32), 4)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_a_gradient_is_refused(case):
    """It would be silently wrong if the op let it pass."""
    function, inputs, _ = case(12)
    inputs = [x.requires_grad_() for x in inputs]
    (dx,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    weight = torch.ones((), requires_grad=True)  # behind an input; what comes in is a constant
    inputs = [(weight * x.detach()).requires_grad_() for x in inputs]
    (dx,) = torch.autograd.grad(function(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="as of a gradient penalty"):
        dx.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="as of a gradient penalty"):
        torch.autograd.grad(dx.sum(), inputs, allow_unused=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_a_compiled_graph_looks_at_its_sequences():
    torch.compiler.reset()
    compiled = torch.compile(lambda qkv, bounds: fastbert.attention_qkv(qkv, bounds, 16), backend="aot_eager")
    qkv = torch.randn(16, 3, 2, 8)
    compiled(qkv, torch.tensor([0, 8, 16], dtype=torch.int32))
    for wrong in ([0, 8, 2_000_000], [0, 8, 12], [0, 16, 8]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            compiled(qkv, torch.tensor(wrong, dtype=torch.int32))
