"""From a batch as users have it to packed tokens: what an encoder asks of its inputs, and the index arithmetic.

Values are looked at on the CPU only, where it costs nothing; elsewhere it would wait for the device, and under
torch.compile it would break the graph. Shapes and dtypes are always checked.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.ops.checks import check_tensor
from fastbert.ops.embedding import embedding, has_kernel

IGNORED = -100  # a label that no loss counts


def take_rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [T, H] at these places, as `within` makes them; zeros where T is 0."""
    if x.shape[0] == 0:
        return x.new_zeros(places.shape[0], x.shape[1])
    return embedding(places, x) if has_kernel(x) else x.index_select(0, places)  # a gradient of one kernel


def within(places: Tensor, tokens: int) -> Tensor:
    """`places`, of which T and more are the last of T tokens."""
    return places.clamp(max=max(tokens - 1, 0))


class Packing(NamedTuple):
    """Where the packed tokens of a batch stand.

    Attributes:
        shape: [B, S] of a padded batch, [T] of one that came packed.
        cu_seqlens: int32 [B + 1], where each sequence starts, and T.
        max_seqlen: tokens of the longest sequence, or more.
        real: int64 [T], the packed tokens' places in the batch read as [B * S]; None where all are real.
    """

    shape: torch.Size
    cu_seqlens: Tensor
    max_seqlen: int
    real: Tensor | None

    def remove_padding(self, ids: Tensor | None) -> Tensor | None:
        """ids of the batch's shape -> [T]; None stays None."""
        if ids is None:
            return None
        return ids.flatten() if self.real is None else ids.flatten().index_select(0, self.real)

    def put_padding_back(self, x: Tensor) -> Tensor:
        """x [T, H] -> [B, S, H] with zeros at padding; [T, H] where the batch came packed."""
        if self.real is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[1]).index_copy(0, self.real, x)
        return x.view(*self.shape, x.shape[1])

    def packed_places(self, places: Tensor) -> Tensor:
        """int64 places in the batch read as [B * S] -> in the packed tokens; any of these for a place at padding."""
        if self.real is None:
            return places
        packed = places.new_zeros(self.shape.numel())
        order = torch.arange(self.real.shape[0], device=places.device)
        return packed.index_copy(0, self.real, order).index_select(0, places)

    def last_places(self) -> Tensor:
        """int64 [B]: likewise of each sequence's last token."""
        return (self.cu_seqlens[1:].long() - 1).clamp(min=0)

    def first_places(self) -> Tensor:
        """int64 [B]: where each sequence's first token is packed; for an empty sequence that of another, or T."""
        return self.cu_seqlens[:-1].long()

    def without_empty(self, first: Tensor) -> Tensor:
        """[B, H], a row per sequence, with zeros for an empty one."""
        has_tokens = self.cu_seqlens[:-1] != self.cu_seqlens[1:]
        return first * has_tokens.unsqueeze(1)


def pack(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    masked_positions: Tensor | None = None,
    more: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> tuple[Packing, Tensor]:
    """Checks the arguments of an encoder's `forward`; returns the packing, and position ids of input_ids' shape.

    `more` are further tensors by name: ids, `<kind>_ids`, below the configuration's `<kind>_vocab_size`; and int32
    `<kind>_ranks`, as `attention` takes them.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace would keep this batch's lengths for every other batch: use torch.compile or torch.export"
        )
    optional = {
        "attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids,
        "cu_seqlens": cu_seqlens, "masked_positions": masked_positions, **more,
    }  # fmt: skip
    _check_tensors({"input_ids": input_ids} | {name: x for name, x in optional.items() if x is not None})
    shape, longest, real = input_ids.shape, config.longest, None
    counted = config.first_position > 0 and position_ids is None
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("a packed batch (cu_seqlens) has no padding: leave attention_mask out")
        max_seqlen = _check_packed(shape, cu_seqlens, max_seqlen, longest)
        if position_ids is None and not counted:
            order, starts = _order(cu_seqlens, shape[0])
            position_ids = (order - starts).long()
    else:
        _check_padded(shape, attention_mask, longest)
        max_seqlen = shape[1]
        if attention_mask is None:
            cu_seqlens = torch.arange(0, shape.numel() + 1, shape[1], dtype=torch.int32, device=input_ids.device)
        else:
            real = attention_mask.flatten().nonzero().squeeze(1)
            cu_seqlens = F.pad(attention_mask.bool().sum(1).cumsum(0), (1, 0)).int()
        if position_ids is None and not counted:
            position_ids = torch.arange(shape[1], device=input_ids.device).unsqueeze(0)
        if position_ids is not None and position_ids.shape == (1, shape[1]):
            position_ids = position_ids.expand(shape)
    if counted:
        position_ids = _counted_places(input_ids, config.pad_token_id, cu_seqlens)
    _check_ids("input_ids", input_ids, shape, config.vocab_size, "vocab_size")
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, shape, config.type_vocab_size, "type_vocab_size")
    _check_ids("position_ids", position_ids, shape, config.max_position_embeddings, "max_position_embeddings")
    for name, ids in more.items():
        if name.endswith("_ranks") and ids is not None:
            _check_ranks(name, ids, shape)
        elif ids is not None:
            limit = f"{name.removesuffix('_ids')}_vocab_size"
            _check_ids(name, ids, shape, getattr(config, limit), limit)
    if masked_positions is not None:
        _check_positions(masked_positions, input_ids.numel())
    return Packing(shape, cu_seqlens, max_seqlen, real), position_ids


def check_targets(
    config: Any,
    input_ids: Tensor,
    cu_seqlens: Tensor | None,
    labels: Tensor | None,
    sentence_labels: dict[str, Tensor | None],
    masked_positions: Tensor | None,
) -> None:
    """Checks what the pretraining heads are to predict, and where, ahead of the encoder; sentence labels by name."""
    if masked_positions is not None:
        _check_positions(masked_positions, input_ids.numel())
    if labels is not None:
        shape = input_ids.shape if masked_positions is None else masked_positions.shape
        _check_labels("labels", labels, shape, config.vocab_size)
    for name, label in sentence_labels.items():
        if label is not None:
            sequences = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            _check_labels(name, label, torch.Size([sequences]), 2)


def _check_tensors(named: dict[str, Any]) -> None:
    for name, x in named.items():
        check_tensor(name, x)


def _check_ids(name: str, ids: Tensor, shape: torch.Size, limit: int, limit_name: str) -> None:
    """Raises unless `ids` is int64 or int32 of this shape, and (where looked at) in [0, limit)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}")
    if _looked_at(ids) and ids.numel():
        low, high = (x.item() for x in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name} must lie in [0, {limit}), {limit_name} being {limit}; got values from {low} to {high}: make "
                "them with the tokenizer and configuration this model was made with"
            )


def check_places(positions: Tensor, max_seqlen: int) -> None:
    """Raises unless packed tokens' places (where looked at) are those of a sequence of `max_seqlen` tokens."""
    if _looked_at(positions) and positions.numel() and positions.max().item() >= max_seqlen:
        raise ValueError(
            f"position_ids must be below max_seqlen = {max_seqlen} in a model with relative positions, got "
            f"{positions.max().item()}: count them from 0 in every sequence, or give a larger max_seqlen"
        )


def _check_ranks(name: str, ranks: Tensor, shape: torch.Size) -> None:
    if ranks.dtype != torch.int32 or ranks.shape != shape:
        raise ValueError(f"{name} must be int32 {list(shape)}, got {ranks.dtype} {list(ranks.shape)}")


def _check_labels(name: str, labels: Tensor, shape: torch.Size, classes: int) -> None:
    """Raises unless `labels` is int64 of this shape, and (where looked at) in [0, classes) or -100."""
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(labels.shape)}")
    if _looked_at(labels) and labels.numel():
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            raise ValueError(
                f"{name} must lie in [0, {classes}), or be {IGNORED} to be ignored; got {labels[wrong][0].item()}"
            )


def _check_padded(shape: torch.Size, attention_mask: Tensor | None, longest: int) -> None:
    """Raises unless this is [B, S] with 1 <= S <= longest, and the mask is bool or integer [B, S]."""
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            "input_ids must be [B, S] with S >= 1, or packed [T] together with cu_seqlens; got shape "
            f"{list(shape)} without it"
        )
    _check_length(shape[1], longest)
    if attention_mask is None:
        return
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer, 0 at padding, got {attention_mask.dtype}; a mask of ones "
            "and zeros becomes one by `mask.bool()`, an additive one (0 and -inf) by `mask == 0`"
        )
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask must have input_ids' shape {list(shape)}, got {list(attention_mask.shape)}")


def _check_packed(shape: torch.Size, cu_seqlens: Tensor, max_seqlen: int | None, longest: int) -> int:
    """Raises unless ids of this shape and `cu_seqlens` are a packed batch; returns the longest sequence's tokens."""
    if len(shape) != 1:
        raise ValueError(f"with cu_seqlens, input_ids must be packed [T], got shape {list(shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must be int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}; make it with "
            "torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )
    if _looked_at(cu_seqlens):
        lengths = cu_seqlens.diff()
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if first != 0 or last != shape[0] or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must start at 0, never decrease and end at the number of tokens, {shape[0]}; got "
                f"{cu_seqlens.tolist()[:3]} ... {last}"
            )
        longest_here = lengths.max().item() if len(lengths) else 0
        if max_seqlen is not None and longest_here > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {longest_here} tokens")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    _check_length(max_seqlen, longest)
    return max_seqlen


def _check_positions(masked_positions: Tensor, tokens: int) -> None:
    """Raises unless `masked_positions` is int64 [M], and (where looked at) in [0, tokens)."""
    if masked_positions.dtype != torch.int64 or masked_positions.dim() != 1:
        raise ValueError(
            f"masked_positions must be int64 [M], got {masked_positions.dtype} {list(masked_positions.shape)}"
        )
    if _looked_at(masked_positions) and masked_positions.numel():
        low, high = (x.item() for x in masked_positions.aminmax())
        if low < 0 or high >= tokens:
            raise ValueError(
                f"masked_positions must lie in [0, {tokens}), places in the packed tokens or in the padded batch read "
                f"as [B * S]; got values from {low} to {high}"
            )


def _order(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The packed tokens' places 0, 1, ..., T - 1, and where each one's sequence starts; waits for no device."""
    order = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return order, cu_seqlens[sequence_of(cu_seqlens, tokens)]


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [T]: the sequence of each packed token; waits for no device."""
    order = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # Never in a slice of cu_seqlens: compiled for a GPU, torch 2.11 searches as if it began at 0 (pytorch#182343).
    return torch.searchsorted(cu_seqlens.contiguous(), order, right=True) - 1


def _counted_places(ids: Tensor, pad_id: int, cu_seqlens: Tensor) -> Tensor:
    """RoBERTa's position ids: a sequence's tokens count from pad_id + 1, wherever it is padded; padding has pad_id."""
    real = (ids != pad_id).long()
    counted = real.cumsum(-1)
    if ids.dim() == 1:  # packed
        _, starts = _order(cu_seqlens, ids.shape[0])
        counted = counted - F.pad(counted, (1, 0))[starts.long()]
    return counted * real + pad_id


def _check_length(tokens: int, longest: int) -> None:
    if tokens > longest:
        raise ValueError(
            f"a sequence has {tokens} tokens, but the position table (max_position_embeddings) holds {longest}: "
            "truncate or split it, or train a model with a longer table"
        )


def _looked_at(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
