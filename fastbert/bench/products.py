"""The ops made of matrix products as they are measured: attention on packed sequences, and a linear layer.

Their operations are those of the products that the real tokens need. Tensors are made on torch's default device.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench import peers
from fastbert.bench.problem import Check, Problem, Variant
from fastbert.bench.problems import normal, seed
from fastbert.ops.attention import attention_qkv
from fastbert.ops.linear import linear as our_linear

HEADS, SIZE = 12, 64  # of attention


def lengths_of(batch: int, longest: int, ragged: bool) -> list[int]:
    """The lengths of a batch's sequences: evenly spaced from a quarter of the longest to all of it, or all of it."""
    return torch.linspace(longest / 4 if ragged else longest, longest, batch, device="cpu").long().tolist()


def attention(
    lengths: Sequence[int], dropout: float, dtype: torch.dtype, among: Collection[str] = (), shape: str = ""
) -> Problem:
    """Attention of sequences of these lengths, [T, 3, 12, 64] packed, beside torch's on the same sequences padded.

    Counted are 4 S^2 D operations for each head and sequence of S tokens forward, 14 S^2 D forward and backward; the
    bytes that must move are 4TNDe + 4TN forward and 12TNDe + 16TN in both.
    """
    sizes = torch.tensor(lengths)
    cu_seqlens, batch, longest, tokens = F.pad(sizes.cumsum(0), (1, 0)).int(), len(lengths), max(lengths), sum(lengths)
    qkv, dout = normal(tokens, 3, HEADS, SIZE, dtype=dtype), normal(tokens, HEADS, SIZE, dtype=dtype)
    padded = normal(3, batch, HEADS, longest, SIZE, dtype=dtype).unbind(0)
    ragged = min(lengths) < longest
    mask = (torch.arange(longest) < sizes[:, None])[:, None, None] if ragged else None  # [B, 1, 1, S]

    def ours(qkv: Tensor, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
        return attention_qkv(qkv, cu_seqlens, longest, dropout_p=dropout, seed=seed, backend=backend)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    twin = partial(ours, seed=seed(), backend="reference")
    mine = Variant(ours, [qkv], dout)
    others = {}
    if peers.FLASH in among and dtype != torch.float32:
        others[peers.FLASH] = Variant(peers.flash_attention(cu_seqlens, longest, dropout), mine.inputs, dout)
    squares, elements = sum(length**2 for length in lengths) * HEADS * SIZE, tokens * HEADS * SIZE * qkv.element_size()
    shape = shape or f"{batch} x {longest}{' ragged' if ragged else ''}, dropout {dropout}"
    return Problem(
        op="attention",
        shape=shape,
        dtype=dtype,
        ours=mine,
        torch=Variant(theirs, padded, normal(batch, HEADS, longest, SIZE, dtype=dtype)),
        check=Check(("out", "dqkv"), partial(ours, seed=seed()), twin, twin, drops=dropout > 0),
        sizes=(4 * elements + 4 * tokens * HEADS, 12 * elements + 16 * tokens * HEADS),
        flops=(4 * squares, 14 * squares),
        peers=others,
        product=True,
    )


def linear(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Problem:
    """A linear layer [M, K] -> [M, N]; ours by the library that `fastbert.use_linear` chooses, torch's by F.linear."""
    shapes = (rows, inner), (columns, inner), (columns,), (rows, columns)
    *inputs, dy = (normal(*shape, dtype=dtype) for shape in shapes)
    x, weight, bias = (tensor.nbytes for tensor in inputs)
    once = x + weight + bias + dy.nbytes
    operations = 2 * rows * inner * columns
    return Problem(
        op="linear",
        shape=f"{rows} x {inner} to {columns}",
        dtype=dtype,
        ours=Variant(our_linear, inputs, dy),
        torch=Variant(F.linear, inputs, dy),
        check=Check(("y", "dx", "dweight", "dbias"), our_linear, F.linear, F.linear),
        sizes=(once, 2 * once + x + weight),  # backward reads x, weight and dy, and writes dx, dweight and dbias
        flops=(operations, 3 * operations),
        product=True,
    )
