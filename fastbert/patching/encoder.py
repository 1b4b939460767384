"""A batch's way through a patched encoder: packed once, through the layers, and padded again.

What is not packed goes to the original `forward`; `obstacles` says why.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from fastbert.models.inputs import Packing
from fastbert.ops.attention import attention
from fastbert.ops.dropout import dropout
from fastbert.ops.gelu import gelu
from fastbert.ops.layer_norm import dropout_add_layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.philox import draw_seeds
from fastbert.patching import obstacles
from fastbert.patching.kinds import Encoder, LayerParts, gelu_form


def encode(kind: Encoder, model: nn.Module, original: Callable, given: dict[str, Any]) -> Any:
    """What the `forward` of a patched encoder returns; `given` are its arguments by name."""
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        return original(model, **given)  # for its message
    packing = obstacles.in_recording() or _packing(kind, model, given)
    if isinstance(packing, str):
        obstacles.tell(packing)
        return original(model, **given)
    wants_states = given.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
    states = [packing.put_padding_back(x) for x in _states(kind, model, packing, given, all_of_them=wants_states)]
    pooled = {} if kind.pool is None else {"pooler_output": kind.pool(model, states[-1])}
    output = kind.output(last_hidden_state=states[-1], hidden_states=tuple(states) if wants_states else None, **pooled)
    return as_asked(model, given, output)


def as_asked(model: nn.Module, given: dict[str, Any], output: ModelOutput) -> ModelOutput | tuple:
    """The output by names or as a tuple, as the call or the configuration says."""
    by_names = given.get("return_dict")
    return output if (model.config.return_dict if by_names is None else by_names) else output.to_tuple()


@torch.compiler.disable  # it looks at the mask, and many modules
def _packing(kind: Encoder, model: nn.Module, given: dict[str, Any]) -> Packing | str:
    """Where the batch's tokens stand, or why this call is not packed."""
    words = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    mask = given.get("attention_mask")
    why = obstacles.in_call(model, given, words.shape[:2]) or obstacles.in_model(model, kind)
    return why or pack(words, mask)


@torch.compiler.disable  # how many tokens there are is known when they have been counted
def pack(x: Tensor, mask: Tensor | None) -> Packing:
    """Where the tokens of x [B, S, ...] stand that the mask [B, S] does not hide; on a GPU it waits for the device."""
    shape = x.shape[:2]
    if mask is None:
        cu_seqlens = torch.arange(0, shape.numel() + 1, max(shape[1], 1), dtype=torch.int32, device=x.device)
        return Packing(shape, cu_seqlens, shape[1], None)
    mask = mask.to(x.device) != 0
    real = mask.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return Packing(shape, cu_seqlens, shape[1], real if len(real) < mask.numel() else None)


def packed(packing: Packing, x: Tensor) -> Tensor:
    """x [B, S, ...] -> [T, ...]."""
    x = x.flatten(0, 1)
    return x if packing.real is None else x.index_select(0, packing.real)


def _states(
    kind: Encoder, model: nn.Module, packing: Packing, given: dict[str, Any], all_of_them: bool
) -> Iterator[Tensor]:
    """Packed tokens [T, H] as they enter each layer and leave the last, or these alone.

    In the dtype that transformers gives them: under autocast the layers compute in its dtype, and the last LayerNorm of
    theirs gives float32.
    """
    layers = kind.layers(model)
    parts = [kind.parts(layer) for layer in layers]
    seed, *seeds = _draw_seeds(model, parts, packing.cu_seqlens.device)
    x = _embed(model, packing, given)
    dtype = x.dtype
    dropped = model.embeddings.dropout
    x = dropout(norm(model.embeddings.LayerNorm, x), dropped.p if dropped.training else 0.0, seed)
    project = kind.project(model)
    x = x if project is None else product(project, x)
    for number, layer in enumerate(layers):
        if all_of_them:
            yield x.to(dtype)
        compute = functools.partial(_layer, parts[number], packing, seeds[3 * number : 3 * number + 3])
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            compute = functools.partial(layer._gradient_checkpointing_func, compute)
        x = compute(x)
    yield x.to(dtype)


def _draw_seeds(model: nn.Module, layers: list[LayerParts], device: torch.device) -> list[Tensor | None]:
    """The embeddings' of dropout, then three of each layer, all at once."""
    if not model.training:
        return [None] * (1 + 3 * len(layers))  # ops draw their own where a part is in training mode all the same
    probabilities = [model.embeddings.dropout.p]
    for parts in layers:
        dropouts = parts.attention_dropout, parts.dense_dropout, parts.outer_dropout
        probabilities += [0.0 if each is None else each.p for each in dropouts]
    return draw_seeds(probabilities, device)


def _embed(model: nn.Module, packing: Packing, given: dict[str, Any]) -> Tensor:
    """The sum of a batch's embeddings, [T, H]."""
    tables, shape = model.embeddings, packing.shape
    words, embedded = given.get("input_ids"), given.get("inputs_embeds")
    x = tables.word_embeddings(packed(packing, words)) if embedded is None else packed(packing, embedded)
    for name in ("token_type", "task_type"):
        table = getattr(tables, f"{name}_embeddings", None)
        if table is not None:
            x = x + _looked_up(table, packing, given.get(f"{name}_ids"), x)
    return x + tables.position_embeddings(packing.remove_padding(_positions(tables, words, embedded, given, shape)))


def _looked_up(table: nn.Module, packing: Packing, ids: Tensor | None, beside: Tensor) -> Tensor:
    """Of ids [B, S], or of zeros."""
    if ids is None:
        return table(torch.zeros(1, dtype=torch.int64, device=beside.device))
    return table(packing.remove_padding(ids.expand(packing.shape)))


def _positions(
    tables: nn.Module, words: Tensor | None, embedded: Tensor | None, given: dict[str, Any], shape: torch.Size
) -> Tensor:
    """[B, S]."""
    ids = given.get("position_ids")
    if ids is None and hasattr(tables, "create_position_ids_from_input_ids"):  # RoBERTa counts from behind its padding
        if words is not None:
            return tables.create_position_ids_from_input_ids(words, tables.padding_idx)
        return tables.create_position_ids_from_inputs_embeds(embedded, tables.padding_idx)
    return (tables.position_ids[:, : shape[1]] if ids is None else ids).expand(shape)


def _layer(parts: LayerParts, packing: Packing, seeds: list[Tensor | None], x: Tensor) -> Tensor:
    """[T, H] -> [T, H]."""
    q, k, v = (product(each, x).unflatten(1, (parts.heads, -1)) for each in (parts.query, parts.key, parts.value))
    dropout_p = parts.attention_dropout.p if parts.attention_training else 0.0
    options = {"dropout_p": dropout_p, "seed": seeds[0], "scale": parts.scale}
    heads = attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, **options).flatten(1)
    x = norm(parts.attention_norm, product(parts.dense, heads), x, parts.dense_dropout, seeds[1])
    inner = activated(parts.inner, parts.activation, x)
    return norm(parts.norm, product(parts.outer, inner), x, parts.outer_dropout, seeds[2])


# ---- modules: torch's own by our ops, all others, such as adapters, as they are ------------------------------------


def product(module: nn.Module, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias) if type(module) is nn.Linear else module(x)


def activated(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """GELU of a product, with the bias added in GELU's own pass over memory."""
    form = gelu_form(activation)
    if form is None:
        return activation(product(module, x))
    if type(module) is nn.Linear:
        return gelu(linear(x, module.weight), module.bias, form)
    return gelu(module(x), None, form)


def norm(
    module: nn.Module, x: Tensor, residual: Tensor | None = None, dropped: nn.Dropout | None = None,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm of residual + dropout(x)."""
    dropout_p = dropped.p if dropped is not None and dropped.training else 0.0
    if type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None:
        return dropout_add_layer_norm(x, residual, module.weight, module.bias, module.eps, dropout_p, seed)
    x = dropout(x, dropout_p, seed)
    return module(x if residual is None else x + residual)
