"""Attention alone, for transformers' attention interface: packed before it and padded behind it, in each layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fastbert.ops.attention import attention
from fastbert.patching.encoder import pack, packed

NAME = "fastbert"
# What attention takes in some models and changes its result; all else that transformers hands along does not.
UNKNOWN_HERE = ("position_bias", "sliding_window", "softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k")


def register() -> None:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    *, mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """The padding mask [B, S] as it is, which `attend` reads; other arguments describe masks that are not made here.

    Raises:
        ValueError: tokens are to see others than all, or all before them.
    """
    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError(
            f"attn_implementation={NAME!r} computes full and causal attention with padding; this model's mask is "
            'another, such as a window or several texts in a row: use attn_implementation="sdpa"'
        )
    return attention_mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, N, S, D] and a padding mask [B, S] or None -> [B, S, N, D], 0 at padding; no weights.

    Raises:
        ValueError: keys are others than the queries' own, heads share keys, a mask of another form, or arguments that
            change attention in other ways.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attn_implementation={NAME!r} is self-attention of whole sequences, got {query.shape[2]} queries beside "
            f'{key.shape[2]} keys: cross-attention and caches run with "sdpa" (or with use_cache=False)'
        )
    given = [name for name in UNKNOWN_HERE if others.get(name) is not None]
    if given:
        raise ValueError(f'attn_implementation={NAME!r} does not compute {", ".join(given)}: use "sdpa"')
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"attn_implementation={NAME!r} takes queries, keys and values of one shape, got {list(query.shape)}, "
            f'{list(key.shape)} and {list(value.shape)}: heads that share keys run with "sdpa"'
        )
    if attention_mask is not None and attention_mask.shape != query.shape[0:3:2]:
        raise ValueError(
            f"attn_implementation={NAME!r} takes a padding mask [batch, tokens], here {list(query.shape[0:3:2])}, got "
            f'one of shape {list(attention_mask.shape)}: mend it, or use "sdpa" for masks of other forms'
        )
    packing = pack(query.transpose(1, 2), attention_mask)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    q, k, v = (packed(packing, x.transpose(1, 2)) for x in (query, key, value))
    options = {"dropout_p": dropout, "scale": scaling, "causal": causal}
    out = attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, **options)  # [T, N, D]
    return packing.put_padding_back(out.flatten(1)).unflatten(2, out.shape[1:]), None
