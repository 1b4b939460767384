"""The building blocks of a BERT layer as modules: parameters, and one call into the ops.

They work on packed tokens, [T, H] without padding, and follow autocast as the ops do. Dropout takes a seed, int64 [1],
or draws one from torch's default generator, so `torch.manual_seed` reproduces a run on every backend alike.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.ops.attention import attention_qkv
from fastbert.ops.dropout import dropout
from fastbert.ops.embedding import embedding, has_kernel, tied_embedding
from fastbert.ops.embedding_norm import Table, embedding_norm
from fastbert.ops.gelu import gelu
from fastbert.ops.hard_attention import hard_attention
from fastbert.ops.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_twice, layer_norm
from fastbert.ops.linear import linear


class LayerNorm(nn.Module):
    """LayerNorm over the last axis: `layer_norm(x)`.

    Args:
        size: N, elements of the last axis.
        eps: added to the variance; BERT's own default.

    Shapes: x [..., N] -> [..., N] in x's dtype (the autocast dtype under autocast). Weight 1 and bias 0 at the start.
    """

    def __init__(self, size: int, eps: float = 1e-12):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class DropoutAddLayerNorm(LayerNorm):
    """`layer_norm(residual + dropout(x))`, how a post-norm transformer block ends; dropout in training mode only.

    Args:
        size: N, elements of the last axis.
        eps: added to the variance.
        dropout_p: probability that an element of x is dropped.

    Shapes: x [..., N], residual [..., N] -> [..., N] in x's dtype.
    """

    def __init__(self, size: int, eps: float = 1e-12, dropout_p: float = 0.0):
        super().__init__(size, eps)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor, seed: Tensor | None = None) -> Tensor:
        return dropout_add_layer_norm(x, residual, *self._options(), seed)

    def twice(
        self, x: Tensor, residual: Tensor, seed: Tensor | None = None, x_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """For a result with two uses, see `dropout_add_layer_norm_twice`; `x_bias` [N] is added to x first."""
        return dropout_add_layer_norm_twice(x, residual, *self._options(), seed, x_bias=x_bias)

    def _options(self) -> tuple[Tensor, Tensor, float, float]:
        return self.weight, self.bias, self.eps, self.dropout_p if self.training else 0.0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


class Linear(nn.Linear):
    """`torch.nn.Linear` whose products run on the library that suits the processor, see `fastbert.linear`.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)


def _product(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """By `linear`, or where the weight is a `FrozenWeight`, by itself."""
    return linear(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias)


class DenseAddLayerNorm(nn.Module):
    """How both halves of a layer end: dense, dropout, residual, LayerNorm, for two uses of the result.

    LayerNorm adds the dense layer's bias, and sums its gradient, in its own passes over memory. So that bias stays in
    LayerNorm's dtype where products take another.

    Args:
        in_features: F.
        hidden_size: H.
        eps, dropout_p: as `DropoutAddLayerNorm`.
        bias: whether the dense layer has one.

    Shapes: x [T, F], residual [T, H] -> [T, H] twice, see `dropout_add_layer_norm_twice`.
    """

    def __init__(
        self, in_features: int, hidden_size: int, eps: float = 1e-12, dropout_p: float = 0.0, bias: bool = True
    ):
        super().__init__()
        self.dense = Linear(in_features, hidden_size, bias=bias)
        self.LayerNorm = DropoutAddLayerNorm(hidden_size, eps, dropout_p)

    def forward(self, x: Tensor, residual: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dense = self.dense
        if type(dense) is Linear and not _has_hooks(dense):
            return self.LayerNorm.twice(_product(x, dense.weight), residual, seed, dense.bias)
        # What stands in its place, such as an adapter, adds the bias itself; a hook sees the layer's whole result.
        return self.LayerNorm.twice(dense(x), residual, seed)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def with_own_bias(model: nn.Module) -> dict[str, nn.Linear]:
    """By name the linear layers whose product adds the bias: all but those of `DenseAddLayerNorm`."""
    others = {id(module.dense) for module in model.modules() if isinstance(module, DenseAddLayerNorm)}
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear) and id(module) not in others}


class LinearGELU(nn.Module):
    """`gelu(linear(x))` with the linear layer's bias added inside GELU's own pass over memory.

    Not an `nn.Linear`, which adapters and quantizers would take for one that is linear.

    Args:
        in_features, out_features: sizes of the last axis before and after.
        approximate: "none" for the exact form (erf), "tanh" for the tanh form.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def __init__(self, in_features: int, out_features: int, approximate: str = "none"):
        super().__init__()
        self.in_features, self.out_features, self.approximate = in_features, out_features, approximate
        layer = nn.Linear(in_features, out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return gelu(_product(x, self.weight), self.bias, self.approximate)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, approximate={self.approximate!r}"


class MultiHeadAttention(nn.Module):
    """Self-attention of packed sequences, from hidden states to the heads' outputs side by side.

    Queries, keys and values come from one product, and attention reads them as strided views of its result.

    Args:
        hidden_size: H, a multiple of heads.
        heads: N.
        dropout_p: probability that an attention weight is dropped, in training mode only.
        causal: whether a token sees none of those behind it.
        window: (left, right) of `attention`, or None.
        global_first: whether, with a window and unless causal, each sequence's first token is a global one.
        attention_kind: "soft", "hard" or "gumbel", the last with noise in training mode only; see `hard_attention`.
        temperature: of the latter two; the attribute may be set between steps, as by `annealed_temperature`.

    Shapes: x [T, H], cu_seqlens int32 [B + 1], max_seqlen -> [T, H], or [R, H] of the tokens `read`, int64 [R].
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        dropout_p: float = 0.0,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        global_first: bool = False,
        attention_kind: str = "soft",
        temperature: float = 1.0,
    ):
        super().__init__()
        self.window = window
        self.global_first = global_first and window is not None and not causal
        self.attention_kind = attention_kind
        self.temperature = temperature
        self.heads = heads
        self.dropout_p = dropout_p
        self.causal = causal
        self.qkv = Linear(hidden_size, 3 * hidden_size)  # rows: all of query, then key, then value

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)  # [T, 3, N, D]
        options = {"seed": seed, "causal": self.causal, "window": self.window}
        if self.global_first:
            options["global_tokens"] = _first_tokens(cu_seqlens, len(x))
        if self.attention_kind == "soft":
            options["dropout_p"] = self.dropout_p if self.training else 0.0
            return attention_qkv(qkv, cu_seqlens, max_seqlen, read=read, **options).flatten(1)
        options |= {"temperature": self.temperature, "gumbel": self.attention_kind == "gumbel" and self.training}
        heads = hard_attention(*qkv.unbind(1), cu_seqlens, max_seqlen, **options).flatten(1)
        return heads if read is None else heads.index_select(0, read)


def _first_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """bool [T]: where a sequence starts."""
    chosen = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)  # empty ones may start at T
    return chosen.index_fill(0, cu_seqlens[:-1].long(), True)[:-1]


class Dropout(nn.Module):
    """Dropout in training mode by the masks of the LayerNorm op: equal on every backend and on any thread count.

    `torch.nn.Dropout` draws its numbers serially on a CPU and takes longer there than a LayerNorm.

    Args:
        p: probability that an element is dropped; the others are scaled by `1 / (1 - p)`.

    Shapes: x [..., N] -> [..., N] in x's dtype.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        return dropout(x, self.p, seed) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class WordEmbedding(nn.Embedding):
    """`nn.Embedding` whose table also decodes: ids [T] -> [T, H].

    Attributes:
        is_tied: whether the next use of the table is a decoder that takes `as_decoder()`, and by `padded_linear`. On a
            GPU the gradient of the look-up is then added to the decoder's by one kernel.
    """

    is_tied = False
    _decoder: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.is_tied and torch.is_grad_enabled() and has_kernel(self.weight):
            x, self._decoder = tied_embedding(ids, self.weight, self.padding_idx)
            return x
        return super().forward(ids)

    def keep_decoder(self, table: Tensor) -> None:
        """For `as_decoder`: the table as `embedding_norm` gives it for its second use."""
        if self.is_tied and torch.is_grad_enabled() and has_kernel(self.weight):
            self._decoder = table

    def as_decoder(self) -> Tensor:
        """The table as it decodes what became of the last look-up."""
        if self._decoder is None:  # nothing is written: torch.compile would compile again for it
            return self.weight
        table, self._decoder = self._decoder, None
        return table


class SmallEmbedding(nn.Embedding):
    """`nn.Embedding` of few rows: ids [T] -> [T, H].

    For a table's gradient on a GPU torch sorts the ids, by a dozen kernels. Here it is one kernel or one product, see
    `fastbert.ops.embedding`.
    """

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight, self.padding_idx) if self.weight.is_cuda else super().forward(ids)


def embed(
    rows: Sequence[tuple[nn.Embedding, Tensor | None]], norm: LayerNorm, drop: Dropout, seed: Tensor | None
) -> Tensor:
    """`drop(norm(sum of the tables' rows))`, in one pass over memory where these modules are the usual ones.

    Args:
        rows: each table and its ids [T], None for its first row alone; the first is that of the words.
        norm, drop: what follows.
        seed: dropout's.

    Returns:
        [T, H].
    """
    if not _computed_by_one_op(rows, norm, drop):
        x = functools.reduce(torch.add, (of.weight[0] if ids is None else of(ids) for of, ids in rows))
        return drop(norm(x), seed)
    tables = [Table(of.weight, ids, of.padding_idx, of.sparse) for of, ids in rows]
    y, decoder = embedding_norm(tables, norm.weight, norm.bias, norm.eps, drop.p if drop.training else 0.0, seed)
    words, _ = rows[0]
    if isinstance(words, WordEmbedding):
        words.keep_decoder(decoder)
    return y


def _computed_by_one_op(rows: Sequence[tuple[nn.Embedding, Tensor | None]], norm: nn.Module, drop: nn.Module) -> bool:
    """Not where an adapter stands in a module's place, a hook wants to see its result, or it has options of its own."""
    tables = [of for of, _ in rows]
    if not all(type(of) in (nn.Embedding, WordEmbedding, SmallEmbedding) for of in tables):
        return False
    if type(norm) is not LayerNorm or type(drop) is not Dropout or any(map(_has_hooks, (*tables, norm, drop))):
        return False
    if any(of.max_norm is not None or of.scale_grad_by_freq for of in tables):
        return False
    return len({of.weight.dtype for of in tables}) == 1
