"""Parameter names of Hugging Face's models <-> ours, a table for each.

Ours are those of Hugging Face's BERT but for one thing: query, key and value are one matrix, `attention.self.qkv`.
Another model's names differ in what its table lists, and XLNet's matrices in their shape. Files of old say gamma and
beta for a LayerNorm's weight and bias, leave out the prefix (`bert.`) where only the encoder was saved, and carry
`position_ids`; wrappers (DataParallel, torch.compile, Lightning) put a prefix of their own before all names.
"""

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_QKV, _PARTS = ".qkv.", (".query.", ".key.", ".value.")
_BUFFERS = ("position_ids", "token_type_ids")
_NORMS = ("LayerNorm.", "layer_norm.")


class Names(NamedTuple):
    """What one architecture is called in Hugging Face's folders.

    Attributes:
        model_type: in config.json.
        encoder: the encoder's name in a model that has heads.
        title: what its classes' names begin with.
        article: in a sentence.
        predictions: what the masked word head's names begin with.
        heads: what the names of all heads begin with that stand on the encoder.
        renamed: parts of names, ours and theirs, in this order.
        words: the word embedding in an encoder, by their name. decoder_weight: what is tied to it, in the head.
        anchor: what every encoder has once, by their name; the word embedding may be the decoder.
        by_head: whether the matrices of attention are [H, N, D] there, see `_by_head`.
        fixed: what no such model does here, by configuration field: the one value it can take.
    """

    model_type: str
    encoder: str
    title: str
    article: str
    predictions: str
    heads: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    words: str = "embeddings.word_embeddings.weight"
    decoder_weight: str = "decoder.weight"
    anchor: str = "embeddings.position_embeddings.weight"
    by_head: bool = False
    fixed: Mapping[str, Any] = MappingProxyType({"position_embedding_type": "absolute", "add_cross_attention": False})

    @property
    def base(self) -> str:
        """What the encoder's names begin with in a model that has heads."""
        return f"{self.encoder}."

    @property
    def embedding(self) -> str:
        """The word embedding, to which `decoder` is tied."""
        return self.base + self.words

    @property
    def bias(self) -> str:
        """The masked word head's bias, to which `decoder_bias` is tied."""
        return f"{self.predictions}bias"

    @property
    def decoder(self) -> str:
        return self.predictions + self.decoder_weight

    @property
    def decoder_bias(self) -> str:
        return f"{self.predictions}decoder.bias"


BERT = Names("bert", "bert", "Bert", "a BERT", "cls.predictions.", ("cls.", "classifier."))
ERNIE = BERT._replace(model_type="ernie", encoder="ernie", title="Ernie", article="an ERNIE")
ROBERTA = Names(
    "roberta",
    "roberta",
    "Roberta",
    "a RoBERTa",
    "lm_head.",
    ("lm_head.", "classifier."),
    renamed=(("lm_head.transform.dense.", "lm_head.dense."), ("lm_head.transform.LayerNorm.", "lm_head.layer_norm.")),
)
XLM_ROBERTA = ROBERTA._replace(model_type="xlm-roberta", title="XLMRoberta", article="an XLM-RoBERTa")
ALBERT = Names(
    "albert",
    "albert",
    "Albert",
    "an ALBERT",
    "predictions.",
    ("predictions.", "sop_classifier.", "classifier."),
    renamed=(
        (".attention.self.", ".attention."),
        (".attention.output.", ".attention."),
        (".intermediate.dense.", ".ffn."),
        (".output.dense.", ".ffn_output."),
        (".output.LayerNorm.", ".full_layer_layer_norm."),
        ("predictions.transform.", "predictions."),
    ),
)

XLNET = Names(
    "xlnet",
    "transformer",
    "XLNet",
    "an XLNet",
    "lm_loss.",
    ("lm_loss.", "sequence_summary.", "logits_proj."),
    renamed=(
        ("embeddings.word_embeddings.", "word_embedding."),
        ("embeddings.mask_emb", "mask_emb"),
        ("encoder.layer.", "layer."),
        (".attention.self.query.weight", ".rel_attn.q"),
        (".attention.self.key.weight", ".rel_attn.k"),
        (".attention.self.value.weight", ".rel_attn.v"),
        (".attention.output.dense.weight", ".rel_attn.o"),
        (".attention.self.", ".rel_attn."),
        (".attention.output.LayerNorm.", ".rel_attn.layer_norm."),
        (".intermediate.dense.", ".ff.layer_1."),
        (".output.dense.", ".ff.layer_2."),
        (".output.LayerNorm.", ".ff.layer_norm."),
    ),
    words="word_embedding.weight",
    decoder_weight="weight",
    anchor="mask_emb",
    by_head=True,
    fixed=MappingProxyType({"attn_type": "bi", "bi_data": False, "clamp_len": -1}),
)


def to_hugging_face(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: each `qkv` becomes the three views query, key and value."""
    named = {}
    for name, tensor in state.items():
        theirs = _theirs(name, names)
        named |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    return _by_head(named) if names.by_head else named


def from_hugging_face(named: dict[str, Tensor], ours: Iterable[str], names: Names) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`: the tensors of our names, all of which must be there under theirs."""
    named = _as_matrices(named) if names.by_head else named
    parts = {name: [named[theirs] for theirs in _theirs(name, names)] for name in ours}
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


def _theirs(name: str, names: Names) -> list[str]:
    """What our parameter is called there: one name, or three."""
    parts = [name.replace(_QKV, part) for part in _PARTS] if _QKV in name else [name]
    for ours, theirs in names.renamed:
        parts = [part.replace(ours, theirs) for part in parts]
    return parts


def _by_head(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key, value and output matrices, ours [out, in], as [H, N, D], which the relative positions' `r` is."""
    made = dict(named)
    for name, r in named.items():
        if name.endswith(".r"):
            made |= {name[:-1] + part: named[name[:-1] + part].t().reshape(r.shape) for part in "qkv"}
            made[name[:-1] + "o"] = named[name[:-1] + "o"].reshape(r.shape)
    return made


def _as_matrices(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_by_head`."""
    made = dict(named)
    for name in named:
        if name.endswith(".r"):
            made |= {name[:-1] + part: named[name[:-1] + part].flatten(1).t() for part in "qkv"}
            made[name[:-1] + "o"] = named[name[:-1] + "o"].flatten(1)
    return made


def encoder_prefix(given: list[str], source: str | os.PathLike, names: Names) -> str:
    """What stands before the encoder's names: "", "bert.", "module.bert." and so on.

    Raises:
        ValueError: there are several encoders.
    """
    found = [name.removesuffix(names.anchor) for name in given if ("." + name).endswith("." + names.anchor)]
    if len(found) > 1:
        raise ValueError(
            f"{source} holds {len(found)} encoders, under {', '.join(map(repr, found))}: save the one that is wanted"
        )
    return found[0] if found else names.base if any(name.startswith(names.base) for name in given) else ""


def normalize(tensors: dict[str, Tensor], source: str | os.PathLike, names: Names) -> dict[str, Tensor]:
    """The tensors under today's names: the encoder's begin with its base (`bert.`), the pretraining heads' with theirs.

    Raises:
        ValueError: several encoders, or two tensors for one parameter.
    """
    prefix = encoder_prefix(list(tensors), source, names)
    wrapper = prefix.removesuffix(names.base) if ("." + prefix).endswith("." + names.base) else prefix
    named: dict[str, Tensor] = {}
    for given, tensor in tensors.items():
        name = _today(given)
        if name.startswith(wrapper):
            name = name.removeprefix(wrapper)
            if wrapper == prefix and not name.startswith(names.heads):
                name = names.base + name
        if name in named:
            raise ValueError(f"{source} holds two tensors for {name}, one of them as {given}: keep the right one")
        if not name.endswith(_BUFFERS):
            named[name] = tensor
    return named


def _today(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if parameter in ("gamma", "beta") and (module + ".").endswith(_NORMS):
        return f"{module}.{'weight' if parameter == 'gamma' else 'bias'}"
    return name
