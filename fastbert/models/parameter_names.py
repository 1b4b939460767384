"""Parameter names of Hugging Face's BERTs <-> ours.

Our names are Hugging Face's but for one thing: query, key and value are one matrix, `attention.self.qkv`. Files of old
say gamma and beta for a LayerNorm's weight and bias, leave out the prefix `bert.` where only the encoder was saved, and
carry `position_ids`; wrappers (DataParallel, torch.compile, Lightning) put a prefix of their own before all names.
"""

import os

import torch
from torch import Tensor

_QKV, _PARTS = ".attention.self.qkv.", (".attention.self.query.", ".attention.self.key.", ".attention.self.value.")
_ANCHOR = "embeddings.position_embeddings.weight"  # every BERT has it once; the word embedding may be the decoder
_BUFFERS = ("position_ids", "token_type_ids")


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: each `qkv` becomes the three views query, key and value."""
    named = {}
    for name, tensor in state.items():
        if _QKV in name:
            named |= {name.replace(_QKV, part): x for part, x in zip(_PARTS, tensor.chunk(3), strict=True)}
        else:
            named[name] = tensor
    return named


def from_hugging_face(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`; every layer must have query, key and value."""
    state = {}
    for name, tensor in named.items():
        if _PARTS[0] in name:
            state[name.replace(_PARTS[0], _QKV)] = torch.cat([named[name.replace(_PARTS[0], x)] for x in _PARTS])
        elif not any(part in name for part in _PARTS):
            state[name] = tensor
    return state


def encoder_prefix(names: list[str], source: str | os.PathLike) -> str:
    """What stands before the encoder's names: "", "bert.", "module.bert." and so on.

    Raises:
        ValueError: there are several encoders.
    """
    found = [name.removesuffix(_ANCHOR) for name in names if ("." + name).endswith("." + _ANCHOR)]
    if len(found) > 1:
        raise ValueError(
            f"{source} holds {len(found)} encoders, under {', '.join(map(repr, found))}: save the one that is wanted"
        )
    return found[0] if found else "bert." if any(name.startswith("bert.") for name in names) else ""


def normalize(tensors: dict[str, Tensor], source: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors under today's names: the encoder's begin with `bert.`, the pretraining heads' with `cls.`.

    Raises:
        ValueError: several encoders, or two tensors for one parameter.
    """
    prefix = encoder_prefix(list(tensors), source)
    wrapper = prefix.removesuffix("bert.") if ("." + prefix).endswith(".bert.") else prefix
    named: dict[str, Tensor] = {}
    for given, tensor in tensors.items():
        name = given
        if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):
            name = name.removesuffix("gamma").removesuffix("beta") + ("weight" if name.endswith("gamma") else "bias")
        if name.startswith(wrapper):
            name = name.removeprefix(wrapper)
            if wrapper == prefix and not name.startswith("cls."):
                name = "bert." + name
        if name in named:
            raise ValueError(f"{source} holds two tensors for {name}, one of them as {given}: keep the right one")
        if not name.endswith(_BUFFERS):
            named[name] = tensor
    return named
