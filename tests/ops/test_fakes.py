"""What torch.compile is told of an op's results is what its twin and its kernels give: dtypes, shapes and strides."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbert.backends import linear as linear_kernels
from fastbert.backends import linear_product, native
from fastbert.ops import attention as attention_op
from fastbert.ops import attention_distillation as attention_distillation_op
from fastbert.ops import cross_entropy as cross_entropy_op
from fastbert.ops import dropout as dropout_op
from fastbert.ops import embedding_norm as embedding_norm_op
from fastbert.ops import gelu as gelu_op
from fastbert.ops import hard_attention as hard_attention_op
from fastbert.ops import layer_norm as layer_norm_op
from fastbert.ops import linear as linear_op

raw = torch.ops.fastbert  # the kernels, as the dispatcher has them
STEMS = (
    gelu_op, layer_norm_op, dropout_op, embedding_norm_op, cross_entropy_op, attention_op, hard_attention_op,
    attention_distillation_op, linear_op,
)  # fmt: skip
TWINS = [op.functions["reference"] for op in STEMS]  # of those that have one
SEED = torch.tensor([99])
WIDTHS = [(torch.float32, torch.float32)] + [
    (x, w) for x in (torch.bfloat16, torch.float16) for w in (x, torch.float32)
]


def gelu(shape, dtype, weight_dtype):
    x, dy = torch.randn(2, *shape).to(dtype)
    for bias, form in ((None, "none"), (torch.randn(shape[-1]).to(weight_dtype), "tanh")):
        yield raw.gelu_forward, (x, bias, form)
        yield raw.gelu_backward, (dy, x, bias, form)
        yield raw.gelu_backward, (dy.mT.contiguous().mT if dy.dim() > 1 else dy, x, bias, form)


def layer_norm(shape, dtype, weight_dtype):
    x, residual, dy = torch.randn(3, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(weight_dtype)
    mean = rstd = torch.ones(shape[:-1])
    ways = (None, None, 0, None), (bias, None, 0, None), (None, residual, 0, None), (bias, residual, 6554, SEED)
    for x_bias, added, t, seed in ways:
        strided = x.mT.contiguous().mT if added is not None and x.dim() > 1 else x
        yield raw.layer_norm, (strided, x_bias, added, weight, bias, 1e-5, t, seed)
        yield raw.layer_norm_forward, (strided, x_bias, added, weight, bias, 1e-5, t, seed)
        yield raw.layer_norm_backward, (dy, added, x, weight, mean, rstd, t, seed, x_bias is not None)


def dropout(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for given in (x, x.mT.contiguous().mT if x.dim() > 1 else x):
        yield raw.dropout, (given, 6554, SEED)


def embedding_norm(tokens, dtype, weight_dtype):
    """`weight_dtype` is the tables' too."""
    tables, (weight, bias) = torch.randn(4, 6, 24).to(weight_dtype), torch.randn(2, 24).to(weight_dtype)
    ids, dy = torch.arange(tokens) % 6, torch.randn(tokens, 24).to(dtype)
    for tasks, its, t, seed in ((None, None, 0, None), (tables[3], ids, 6554, SEED)):
        looked_up = *tables[:3], tasks, ids, ids, its, its
        yield raw.embedding_norm_forward, (*looked_up, weight, bias, 1e-5, t, seed, dtype)
        yield raw.embedding_norm_recompute, (dy, *looked_up, t, seed)


def cross_entropy(rows, dtype):
    logits, labels, numbers = torch.randn(rows, 24).to(dtype), torch.arange(rows), torch.ones(rows)
    for x in (logits, logits.T.contiguous().T, logits[:, :19], logits[::2]):
        labels, numbers = labels[: len(x)], numbers[: len(x)]
        yield raw.cross_entropy_forward, (x, labels, 0, "mean")
        yield raw.cross_entropy_backward, (numbers, x, labels, numbers, numbers, None, 0)


def attention(lengths, heads, dtype):
    q, k, v = torch.randn(sum(lengths), 3, heads, 8).to(dtype).unbind(1)
    cu_seqlens, lse = torch.tensor([0, *lengths]).cumsum(0).int(), torch.randn(sum(lengths), heads)
    for t, seed, causal, window in ((0, None, False, None), (6554, SEED, True, [2, 3])):
        options = cu_seqlens, max(lengths, default=0), 0.3, t, seed, causal, window
        yield raw.attention_forward, (q, k, v, *options)
        yield raw.attention_backward, (v.contiguous(), q, k, v, q.contiguous(), lse, *options)
    chosen = torch.arange(sum(lengths)) % 3 == 0
    yield raw.attention_forward, (q, k, v, cu_seqlens, max(lengths, default=0), 0.3, 0, None, False, [1, 1], chosen)


def hard_attention(lengths, heads, dtype):
    q, k, v = torch.randn(sum(lengths), 3, heads, 8).to(dtype).unbind(1)
    cu_seqlens, lse = torch.tensor([0, *lengths]).cumsum(0).int(), torch.randn(sum(lengths), heads)
    for seed, causal, window in ((None, False, None), (SEED, True, [2, 3])):
        options = cu_seqlens, max(lengths, default=0), 0.3, 0.7, seed, causal, window
        yield raw.hard_attention_forward, (q, k, v, *options)
        yield raw.hard_attention_backward, (v.contiguous(), q, k, v, lse.int(), lse, *options)


def attention_distillation(lengths, dtype, teacher_dtype):
    q, k = torch.randn(sum(lengths), 3, 2, 8).to(dtype).unbind(1)[:2]
    cu_seqlens, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0)
    for teacher_heads in (2, 4):
        theirs = torch.randn(sum(lengths), 3, teacher_heads, 5).to(teacher_dtype).unbind(1)[:2]
        yield raw.attention_distillation, (q, k, *theirs, cu_seqlens, longest)


def with_twins(dtype, weight_dtype, everything):
    """Calls of every op that has a twin: of usual shapes, and with `everything` of the unusual ones too."""
    for shape in [(4, 24), *([(24,), (0, 24), (1, 24), (2, 3, 24)] if everything else [])]:
        yield from gelu(shape, dtype, weight_dtype)
        yield from layer_norm(shape, dtype, weight_dtype)
        yield from dropout(shape, dtype)
    for rows in [6, *([0, 1] if everything else [])]:
        yield from embedding_norm(rows, dtype, weight_dtype)
        yield from cross_entropy(rows, dtype)
    # One sequence alone: what the twin pads it to has the strides of another layout.
    for lengths in [[5, 9], *([[], [0], [5]] if everything else [])]:
        yield from attention(lengths, 3, dtype)
        yield from hard_attention(lengths, 3, dtype)
        yield from attention_distillation(lengths, dtype, weight_dtype)


def of_linear(dtype, weight_dtype):
    """By each library: every gradient, and one alone."""
    x, weight, bias, dy = torch.randn(4, 24), torch.randn(6, 24), torch.randn(6), torch.randn(4, 6)
    x, weight, bias, dy = x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype), dy.to(dtype)
    if torch.float16 in (dtype, weight_dtype):
        return
    for library, missing in (("onednn", linear_kernels.onednn_missing), ("fastbert", native.cpu_missing)):
        if missing:
            continue
        yield raw.linear_forward, (x, weight, bias, library)
        for wanted in ((x, weight, bias.dtype), (x, None, None), (None, weight, None), (None, None, bias.dtype)):
            yield raw.linear_backward, (dy, *wanted[:2], weight_dtype, wanted[2], library)
    if native.module is not None:
        yield raw.packed_linear, (x, linear_product.linear_packed(weight), bias, 6, 24)


def seen(results):
    """dtype, shape and strides of each; what steps over one element or none is nobody's concern."""
    each = [results] if isinstance(results, Tensor) else results
    strides = [[s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1 and x.numel()] for x in each]
    return [(x.dtype, list(x.shape), stride) for x, stride in zip(each, strides, strict=True)]


def told(op, arguments):
    with FakeTensorMode() as mode:
        return seen(op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)))


@pytest.mark.parametrize(("dtype", "weight_dtype"), WIDTHS, ids=str)
def test_fakes_are_what_twins_and_kernels_give(dtype, weight_dtype):
    for op, arguments in with_twins(dtype, weight_dtype, everything=True):
        expected = told(op, arguments)
        (twin,) = [getattr(twins, op.__name__) for twins in TWINS if hasattr(twins, op.__name__)]
        for function in (twin, op) if native.module else (twin,):
            shapes = [getattr(x, "shape", x) for x in arguments]
            assert seen(function(*arguments)) == expected, (op, function is twin, shapes)
    for op, arguments in of_linear(dtype, weight_dtype):
        expected = told(op, arguments)
        for function in (op, *(getattr(twins, op.__name__) for twins in TWINS if hasattr(twins, op.__name__))):
            assert seen(function(*arguments)) == expected, (op, function is op)


@pytest.mark.skipif(native.module is None, reason=str(native.cpu_missing))
def test_custom_ops_are_sound():
    """Schemas, fakes, no aliases, functionalization: by torch's own check, of the last and fullest call of each op.

    In float32, where a cast that changes nothing would give an input back.
    """
    both = torch.float32, torch.float32
    calls = {op: arguments for op, arguments in with_twins(*both, everything=False)}
    for op, arguments in [*calls.items(), *of_linear(*both)]:
        torch.library.opcheck(op.default, arguments)


def test_every_op_is_among_them():
    ops = {name.removeprefix("fastbert::") for name in torch._C._dispatch_get_all_op_names() if "fastbert::" in name}
    others = "probe", "embedding_backward"  # which have their own tests, as lazy_adam has
    stems = [op for op in ops if not op.startswith("lazy_adam") and op not in others]
    calls = [*with_twins(torch.float32, torch.float32, everything=False), *of_linear(torch.float32, torch.float32)]
    tested = {str(op).removeprefix("fastbert.") for op, _ in calls}
    assert tested == set(stems)
