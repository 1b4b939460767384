"""What aot.py compiles: for each stem a function that calls its launchers once for every width class and option that
changes the code, on tensors of any contents, after naming the case. It is called for each of ROWS, and the second must
not compile anything anew. A new kernel is one function here and its lines in budget.csv.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastbert.ops.lazy_adam import GRAD_BY_ROW, Step

ROWS = 4096, 4001  # that are 0 and 1 in many remainders


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def gelu(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    for columns in (81, 3072):
        x, bias = empty(dtype, rows, columns), empty(dtype, columns)
        for form in ("none", "tanh") if columns == 3072 else ("none",):
            name(columns, form)
            kernels.gelu_forward(x, bias, form)
            kernels.gelu_backward(x, x, bias, form)
    name("without bias")
    kernels.gelu_forward(x, None, "none")
    kernels.gelu_backward(x, x, None, "none")


def embedding_norm(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    seed, ids = empty(torch.int64, 1), empty(torch.int64, rows)
    for columns in (24, 768):
        table, weight = empty(dtype, 512, columns), empty(torch.float32, columns)
        looked_up = *(table,) * 3, None, *(ids,) * 3, None
        name(columns)
        kernels.embedding_norm_forward(*looked_up, weight, weight, 1e-12, 6554, seed, dtype)
        kernels.embedding_norm_recompute(empty(dtype, rows, columns), *looked_up, 6554, seed)


def cross_entropy(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    labels, each = empty(torch.int64, rows), empty(torch.float32, rows)
    for columns, stride in ((81, 81), (30_522, 30_522), (30_522, 30_528)):
        name(columns, "of", stride)
        logits = empty(dtype, rows, stride)[:, :columns]
        kernels.cross_entropy_forward(logits, labels, -100, "mean")
        kernels.cross_entropy_backward(empty(torch.float32), logits, labels, each, each, empty(torch.float32), -100)


def layer_norm(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    seed = empty(torch.int64, 1)
    for columns in (24, 768, 1024, 4096, 8192, 20_000) if dtype != torch.float16 else (768,):
        x, weight, each = empty(dtype, rows, columns), empty(torch.float32, columns), empty(torch.float32, rows)
        name(columns)
        kernels.layer_norm_forward(x, weight, x, weight, weight, 1e-5, 6554, seed)
        kernels.layer_norm_backward(x, x, x, weight, each, each, 6554, seed, True)
        if columns == 768:
            name(columns, "without dropout")
            kernels.layer_norm(x, None, None, weight, weight, 1e-5, 0, None)
            kernels.layer_norm_backward(x, None, x, weight, each, each, 0, None, False)


def dropout(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    for columns in (81, 768):
        name(columns)
        kernels.dropout(empty(dtype, rows, columns), 6554, empty(torch.int64, 1))


def attention(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    cu_seqlens, seed, window = empty(torch.int32, 9 + rows % 2), empty(torch.int64, 1), [64, 64]

    def both(size: int, longest: int, t: int, window: list[int] | None, *of_tokens: Tensor | None) -> None:
        qkv, out, lse = empty(dtype, rows, 3, 12, size), empty(dtype, rows, 12, size), empty(torch.float32, rows, 12)
        given = *qkv.unbind(1), cu_seqlens, longest - rows % 2, 0.125, t, seed if t else None, False, window, *of_tokens
        kernels.attention_forward(*given)
        kernels.attention_backward(out, *given[:3], out, lse, *given[3:])

    for size in (32, 64, 128) if dtype != torch.float16 else ():
        name(size, "dropout window")
        both(size, 512, 26, window)
    if dtype != torch.float32:
        name(64, "dropout")
        both(64, 512, 26, None)
        for size in (32, 64):
            name(size, "short dropout")
            both(size, 128, 26, None)
        name(64)
        both(64, 512, 0, None)
    if dtype == torch.bfloat16:
        name("global tokens", 64)
        both(64, 512, 26, window, empty(torch.bool, rows))
        name("ranks", 200)  # as wide as XLNet's heads
        both(200, 512, 26, None, None, empty(torch.int32, rows), empty(torch.int32, rows))


def hard_attention(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    cu_seqlens, seed, lse = empty(torch.int32, 9 + rows % 2), empty(torch.int64, 1), empty(torch.float32, rows, 12)
    forms = (64, True, False), (64, False, False), (128, True, False), *[(64, True, True)] * (dtype == torch.float32)
    for size, gumbel, has_global in forms if dtype != torch.float16 else ():
        name(*["global tokens"] * has_global, size, "gumbel" if gumbel else "best")
        qkv, out = empty(dtype, rows, 3, 12, size), empty(dtype, rows, 12, size)
        given = *qkv.unbind(1), cu_seqlens, 512 - rows % 2, 0.125, 0.7, seed if gumbel else None, False, [64, 64]
        given = *given, empty(torch.bool, rows) if has_global else None
        kernels.hard_attention_forward(*given)
        kernels.hard_attention_backward(out, *given[:3], lse.int(), lse, *given[3:])


def attention_distillation(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    cu_seqlens = empty(torch.int32, 9 + rows % 2)
    for size, teacher_size in ((26, 64), (64, 64), (128, 128)) if dtype != torch.float16 else ():
        name(size, "by", teacher_size)
        (q, k, _), (teacher_q, teacher_k, _) = (
            empty(dtype, rows, 3, 12, each).unbind(1) for each in (size, teacher_size)
        )
        kernels.attention_distillation(q, k, teacher_q, teacher_k, cu_seqlens, 512 - rows % 2)


def lazy_adam(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    """A parameter of each dtype, with state in float32; what a row's gradient, step and rounding come from varies."""
    number, one, rate = empty(torch.int64, 1), empty(torch.float32, 1), empty(torch.float64, 1)
    ids = torch.zeros(rows, dtype=torch.int64)

    def step(columns: int, ids: Tensor | None, **other: object) -> None:
        table = empty(dtype, 1000, columns)
        m, v = empty(torch.float32, 1000, columns), empty(torch.float32, 1000, columns)
        grad = table if ids is None else empty(dtype, len(ids), columns)
        none = dict.fromkeys(("max_exp_avg_sq", "row_steps", "seed", "grad_factor", "found_inf", "bf16_copy"))
        numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "flags": 0, "padding_idx": -1}
        tensors = {"param": table, "exp_avg": m, "exp_avg_sq": v, "rows": ids, "grad": grad, "lr": rate, "step": one}
        kernels.lazy_adam_steps([Step(**none | numbers | tensors | other, number=0)])

    for columns in (3, 128, 768):
        name(columns, "rows")
        step(columns, ids)
    name(128, "every row, its own steps")
    step(128, None, row_steps=empty(torch.int32, 1000))
    name(768, "by row")
    step(768, ids[:1000], grad=empty(dtype, 1000, 768), flags=GRAD_BY_ROW)
    name(768, "rows, one v each")
    step(768, ids, exp_avg_sq=empty(torch.float32, 1000, 1))
    name(128, "dense")
    step(128, None)
    if dtype == torch.bfloat16:
        name(128, "rows rounded stochastically")
        step(128, ids, seed=number)


def lazy_adam_replay(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    if dtype != torch.float32:
        return
    rate, steps = torch.zeros(rows, dtype=torch.float64), torch.zeros(1000, dtype=torch.int32)
    for columns in (3, 768):
        name(columns)
        table = empty(dtype, 1000, columns)
        given = steps, torch.zeros(rows, dtype=torch.int64), rate, rate, rows, 0.9, 0.999, 1e-8, 0, -1
        kernels.lazy_adam_replay(table, table, table, *given)


def gradient_norm(kernels: ModuleType, dtype: torch.dtype, rows: int, name: Callable) -> None:
    named = empty(torch.uint8, rows)
    name("all")
    kernels.gradient_norm([(empty(dtype, rows, 768), None)], 1.0)
    name("named")
    kernels.gradient_norm([(empty(dtype, rows, 768), named)], 1.0)


CASES = {
    function.__name__: function
    for function in (
        gelu, layer_norm, dropout, embedding_norm, cross_entropy, attention, hard_attention,
        attention_distillation, lazy_adam, lazy_adam_replay, gradient_norm,
    )
}  # fmt: skip
