"""The ops on rows as they are measured: inputs, the variants beside ours, the bytes that must move, the operations.

The operations are nominal, an exponential, an error function or a square root counting as one: they place a point on
the roofline's axis, while what counts is its share of a copy. Tensors are made on torch's default device.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench import peers
from fastbert.bench.problem import Check, Op, Problem, Variant
from fastbert.ops.cross_entropy import cross_entropy as our_cross_entropy
from fastbert.ops.dropout import dropout as our_dropout
from fastbert.ops.embedding_norm import Table
from fastbert.ops.embedding_norm import embedding_norm as our_embedding_norm
from fastbert.ops.gelu import gelu as our_gelu
from fastbert.ops.layer_norm import dropout_add_layer_norm as our_dropout_add_layer_norm
from fastbert.ops.layer_norm import layer_norm as our_layer_norm

EPS, DROPOUT = 1e-12, 0.1


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal, drawn in float32."""
    return torch.randn(*shape).to(dtype)


def seed() -> Tensor:
    """The seed of a mask that is drawn twice."""
    return torch.zeros(1, dtype=torch.int64)


def gelu(rows: int, columns: int, dtype: torch.dtype, approximate: str = "none", biased: bool = True) -> Problem:
    """GELU of [M, N], after adding a bias [N] or not."""
    x, dy = normal(rows, columns, dtype=dtype), normal(rows, columns, dtype=dtype)
    inputs = [x, normal(columns, dtype=dtype)] if biased else [x]

    def ours(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return our_gelu(x, bias, approximate)

    def theirs(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    def truth(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return our_gelu(x, bias, approximate, backend="reference")

    check = Check(("y", "dx", "dbias")[: 1 + len(inputs)], ours, theirs, truth)
    name = ("gelu" if approximate == "none" else "gelu tanh") + (" with bias" if biased else "")
    return _of_rows(name, inputs, dy, (2, 5), (5, 14), ours, theirs, check)


def layer_norm(rows: int, columns: int, dtype: torch.dtype, among: Collection[str] = ()) -> Problem:
    """LayerNorm of [M, N]; `among` names the peers that are here."""
    x, dy = normal(rows, columns, dtype=dtype), normal(rows, columns, dtype=dtype)
    inputs = [x, normal(columns, dtype=dtype), normal(columns, dtype=dtype)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
        return our_layer_norm(x, weight, bias, EPS, backend=backend)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    check = Check(("y", "dx", "dweight", "dbias"), ours, theirs, partial(ours, backend="reference"))
    others = {peers.LIGER: peers.liger_layer_norm(EPS)} if peers.LIGER in among else {}
    return _of_rows("layer_norm", inputs, dy, (2, 5), (8, 22), ours, theirs, check, others)


def dropout_add_layer_norm(rows: int, columns: int, dtype: torch.dtype) -> Problem:
    """LayerNorm of a residual [M, N] and what dropout leaves of x [M, N]; every call draws a new mask."""
    x, residual, dy = (normal(rows, columns, dtype=dtype) for _ in range(3))
    inputs = [x, residual, normal(columns, dtype=dtype), normal(columns, dtype=dtype)]

    def ours(*inputs: Tensor, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
        return our_dropout_add_layer_norm(*inputs, EPS, DROPOUT, seed, backend=backend)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x, DROPOUT), x.shape[-1:], weight, bias, EPS)

    check = _dropped(("y", "dx", "dresidual", "dweight", "dbias"), ours)
    return _of_rows("dropout_add_layer_norm", inputs, dy, (4, 8), (11, 25), ours, theirs, check)


def embedding_norm(tokens: int, columns: int, dtype: torch.dtype) -> Problem:
    """Rows of BERT's three tables added, normalized and dropped: [T, H]; every call draws a new mask.

    Bytes that must move: three rows in and y out, 4THe; in both passes 9THe, and the gradients of the tables, VHe.
    """
    sizes = 30_522, 512, 2  # words, positions, types
    inputs = [normal(size, columns, dtype=dtype) for size in sizes]
    inputs += [normal(columns, dtype=dtype) for _ in range(2)]  # weight and bias
    ids = [torch.randint(size, (tokens,)) for size in sizes]

    def ours(*inputs: Tensor, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
        *tables, weight, bias = inputs
        looked_up = [Table(*each) for each in zip(tables, ids, strict=True)]
        return our_embedding_norm(looked_up, weight, bias, EPS, DROPOUT, seed, backend=backend)[0]

    def theirs(*inputs: Tensor) -> Tensor:
        *tables, weight, bias = inputs
        z = sum(F.embedding(each, table) for each, table in zip(ids, tables, strict=True))
        return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, EPS), DROPOUT)

    dy = normal(tokens, columns, dtype=dtype)
    return Problem(
        op="embedding_norm",
        shape=f"{tokens} x {columns}",
        dtype=dtype,
        ours=Variant(ours, inputs, dy),
        torch=Variant(theirs, inputs, dy),
        check=_dropped(("y", "dwords", "dpositions", "dtypes", "dweight", "dbias"), ours),
        sizes=(4 * dy.nbytes, 9 * dy.nbytes + sum(table.nbytes for table in inputs[:3])),
        flops=(11 * dy.numel(), 27 * dy.numel()),
    )


def dropout(rows: int, columns: int, dtype: torch.dtype) -> Problem:
    """Dropout of [M, N]; every call draws a new mask."""
    x, dy = normal(rows, columns, dtype=dtype), normal(rows, columns, dtype=dtype)

    def ours(x: Tensor, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
        return our_dropout(x, DROPOUT, seed, backend=backend)

    check = _dropped(("y", "dx"), ours)
    return _of_rows("dropout", [x], dy, (2, 4), (1, 2), ours, lambda x: F.dropout(x, DROPOUT), check)


def cross_entropy(rows: int, columns: int, dtype: torch.dtype, among: Collection[str] = ()) -> Problem:
    """The mean cross entropy of logits [M, V]; torch's as a masked-word head computes it, of a float32 copy of them."""
    logits, labels = torch.randn(rows, columns).mul(3).to(dtype), torch.randint(columns, (rows,))

    def ours(logits: Tensor) -> Tensor:
        return our_cross_entropy(logits, labels)

    def theirs(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def truth(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    calls = {peers.LIGER: peers.liger_cross_entropy, peers.QUACK: peers.quack_cross_entropy}
    others = {name: make(labels) for name, make in calls.items() if name in among}
    check = Check(("loss", "dlogits"), ours, theirs, truth)
    return _of_rows("cross_entropy", [logits], torch.ones(()), (1, 3), (4, 7), ours, theirs, check, others)


def _dropped(names: Sequence[str], ours: Op) -> Check:
    """The check of an op that takes `seed` and `backend`: against its twin in plain PyTorch, with one mask."""
    twin = partial(ours, seed=seed(), backend="reference")
    return Check(names, partial(ours, seed=seed()), twin, twin, drops=True)


def _of_rows(
    op: str,
    inputs: Sequence[Tensor],
    dy: Tensor,
    units: tuple[int, int],
    operations: tuple[int, int],
    ours: Op,
    theirs: Op,
    check: Check,
    others: dict[str, Op] | None = None,
) -> Problem:
    """A problem whose first input is [M, N]; bytes come in units of that, and operations for each of its elements."""
    x = inputs[0]
    return Problem(
        op=op,
        shape=f"{len(x)} x {x.shape[1]}",
        dtype=x.dtype,
        ours=Variant(ours, inputs, dy),
        torch=Variant(theirs, inputs, dy),
        check=check,
        sizes=(units[0] * x.nbytes, units[1] * x.nbytes),
        flops=(operations[0] * x.numel(), operations[1] * x.numel()),
        peers={name: Variant(function, inputs, dy) for name, function in (others or {}).items()},
    )
