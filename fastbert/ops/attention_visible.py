"""Which keys a query of attention sees: what a caller may say of it, checked, and turned into what the ops take."""

import torch
from torch import Tensor

from fastbert.backends.attention import NO_LIMIT
from fastbert.ops.checks import as_int, check_tensor, kind


def check_visible(
    x: Tensor, causal: bool, window: tuple[int, int] | None, global_tokens: Tensor | None
) -> tuple[bool, list[int] | None, Tensor | None]:
    """What the ops are told of which keys a query sees: causal, the window's limits, global tokens."""
    if type(causal) is not bool:
        raise TypeError(f"causal must be True or False, got {kind(causal)} {causal!r}")
    limits = None if window is None else _limits(window)
    if global_tokens is not None:
        _check_global(x, causal, window, global_tokens)
    return causal, limits, None if global_tokens is None else global_tokens.contiguous()


def _check_global(x: Tensor, causal: bool, window: tuple[int, int] | None, global_tokens: Tensor) -> None:
    check_tensor("global_tokens", global_tokens)
    if causal:
        raise ValueError(
            "global_tokens do not go with causal: a global token sees tokens behind it, which causal forbids. Leave "
            "one of the two out"
        )
    if window is None:
        raise ValueError(
            "global_tokens need a window: without one every token sees all of its sequence. Give window=(left, right), "
            "or leave global_tokens out"
        )
    expected = torch.bool, x.shape[:1], x.device
    if (global_tokens.dtype, global_tokens.shape, global_tokens.device) != expected:
        raise ValueError(
            f"global_tokens must be bool [{x.shape[0]}], one for each token, on {x.device}, got {global_tokens.dtype} "
            f"{list(global_tokens.shape)} on {global_tokens.device}"
        )


def check_ranks(
    x: Tensor,
    ranks: tuple[Tensor, Tensor] | None,
    causal: bool,
    window: tuple[int, int] | None,
    global_tokens: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What the op is told of ranks: the queries' and the keys'."""
    if ranks is None:
        return None, None
    others = {"causal": causal, "window": window is not None, "global_tokens": global_tokens is not None}
    if given := [name for name, is_given in others.items() if is_given]:
        raise ValueError(
            f"ranks say alone which keys a query sees, and go with neither causal, window nor global_tokens, got "
            f"{' and '.join(given)}. Leave out the one or the other"
        )
    if not isinstance(ranks, tuple | list) or len(ranks) != 2:
        raise TypeError(f"ranks must be (query_ranks, key_ranks), two tensors, or None, got {kind(ranks)}")
    for name, rank in zip(("query_ranks", "key_ranks"), ranks, strict=True):
        check_tensor(name, rank)
        if (rank.dtype, rank.shape, rank.device) != (torch.int32, x.shape[:1], x.device):
            raise ValueError(
                f"{name} must be int32 [{x.shape[0]}], one for each token, on {x.device}, got {rank.dtype} "
                f"{list(rank.shape)} on {rank.device}"
            )
    query_ranks, key_ranks = ranks
    return query_ranks.contiguous(), key_ranks.contiguous()


def _limits(window: tuple[int, int]) -> list[int]:
    """[left, right] as the ops take it: `NO_LIMIT` instead of -1."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be (left, right), two ints, or None, got {window!r}")
    limits = [as_int(f"window's {side}", limit) for side, limit in zip(("left", "right"), window, strict=True)]
    if min(limits) < -1:
        raise ValueError(f"window's left and right must be at least 0, or -1 for no limit to that side, got {window!r}")
    return [NO_LIMIT if limit == -1 else min(limit, NO_LIMIT) for limit in limits]
