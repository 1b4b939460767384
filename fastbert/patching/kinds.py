"""The types of models that are patched, and where each has its parts."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import activations, modeling_outputs
from transformers.models.albert import modeling_albert as albert
from transformers.models.bert import modeling_bert as bert
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.electra import modeling_electra as electra
from transformers.models.ernie import modeling_ernie as ernie
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

# Activations -> `approximate` of fastbert.gelu; nn.GELU has its own.
_GELUS = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.FastGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
}


def gelu_form(activation: Any) -> str | None:
    """ "none" or "tanh", the form of this GELU; None for another activation."""
    return activation.approximate if type(activation) is nn.GELU else _GELUS.get(type(activation))


class LayerParts(NamedTuple):
    """A layer's modules in the order in which they compute, and what else it knows of itself.

    Attributes:
        containers: those that hold the others and compute nothing that is not here.
        heads, scale: of attention.
        attention_dropout: on attention's weights, in training mode only, as `attention_training` says.
    """

    containers: tuple[nn.Module, ...]
    heads: int
    scale: float
    attention_training: bool
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module
    dense: nn.Module
    dense_dropout: nn.Module | None
    attention_norm: nn.Module
    inner: nn.Module
    activation: Any
    outer: nn.Module
    outer_dropout: nn.Module | None
    norm: nn.Module

    @property
    def leaves(self) -> tuple[nn.Module | None, ...]:
        return self[4:]


def _bert_layer(layer: nn.Module) -> LayerParts:
    attention, output = layer.attention, layer.output
    own, end = attention.self, attention.output
    return LayerParts(
        (layer, attention, own, end, layer.intermediate, output), own.num_attention_heads, own.scaling, own.training,
        own.query, own.key, own.value, own.dropout, end.dense, end.dropout, end.LayerNorm,
        layer.intermediate.dense, layer.intermediate.intermediate_act_fn, output.dense, output.dropout,
        output.LayerNorm,
    )  # fmt: skip


def _albert_layer(layer: nn.Module) -> LayerParts:
    own = layer.attention
    return LayerParts(
        (layer, own), own.num_attention_heads, own.scaling, own.training,
        own.query, own.key, own.value, own.attention_dropout, own.dense, own.output_dropout, own.LayerNorm,
        layer.ffn, layer.activation, layer.ffn_output, None, layer.full_layer_layer_norm,
    )  # fmt: skip


def _distilbert_layer(layer: nn.Module) -> LayerParts:
    own, ffn = layer.attention, layer.ffn
    return LayerParts(
        (layer, own, ffn), own.n_heads, own.scaling, own.training,
        own.q_lin, own.k_lin, own.v_lin, own.dropout, own.out_lin, None, layer.sa_layer_norm,
        ffn.lin1, ffn.activation, ffn.lin2, ffn.dropout, layer.output_layer_norm,
    )  # fmt: skip


def _albert_layers(model: nn.Module) -> list[nn.Module]:
    depth, groups = model.config.num_hidden_layers, model.encoder.albert_layer_groups
    return [layer for i in range(depth) for layer in groups[int(i / (depth / len(groups)))].albert_layers]


class Encoder(NamedTuple):
    """A type of encoder.

    Attributes:
        output: what its `forward` returns.
        layers: its layers in the order in which they are called; one may come more than once.
        parts: of a layer.
        project: the linear layer between embeddings and layers, if any.
        pool: [B, S, H] -> [B, H] where the model pools; else None.
        containers: of the model, besides the layers'.
    """

    output: type
    layers: Callable[[nn.Module], list[nn.Module]]
    parts: Callable[[nn.Module], LayerParts]
    project: Callable[[nn.Module], nn.Module | None]
    pool: Callable[[nn.Module, Tensor], Tensor] | None
    containers: Callable[[nn.Module], tuple[nn.Module, ...]]


def _pooled(model: nn.Module, hidden: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler(hidden)


def _albert_pooled(model: nn.Module, hidden: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler_activation(model.pooler(hidden[:, 0]))


_BERT = Encoder(
    modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions,
    layers=lambda model: list(model.encoder.layer),
    parts=_bert_layer,
    project=lambda model: getattr(model, "embeddings_project", None),  # ELECTRA's
    pool=_pooled,
    containers=lambda model: (model.embeddings, model.encoder),
)
_ELECTRA = _BERT._replace(output=modeling_outputs.BaseModelOutputWithPastAndCrossAttentions, pool=None)
_ALBERT = Encoder(
    modeling_outputs.BaseModelOutputWithPooling,
    layers=_albert_layers,
    parts=_albert_layer,
    project=lambda model: model.encoder.embedding_hidden_mapping_in,
    pool=_albert_pooled,
    containers=lambda model: (model.embeddings, model.encoder, *model.encoder.albert_layer_groups),
)
_DISTILBERT = Encoder(
    modeling_outputs.BaseModelOutput,
    layers=lambda model: list(model.transformer.layer),
    parts=_distilbert_layer,
    project=lambda model: None,
    pool=None,
    containers=lambda model: (model.embeddings, model.transformer),
)
ENCODERS: dict[type, Encoder] = {
    bert.BertModel: _BERT,
    roberta.RobertaModel: _BERT,
    xlm_roberta.XLMRobertaModel: _BERT,
    ernie.ErnieModel: _BERT,
    electra.ElectraModel: _ELECTRA,
    albert.AlbertModel: _ALBERT,
    distilbert.DistilBertModel: _DISTILBERT,
}


class PairHead(NamedTuple):
    """The head beside it that judges a pair of texts; its labels' name, and of the output its class and field."""

    classifier: nn.Module
    label: str
    output: type
    logits: str


class WordHead(NamedTuple):
    """The parts of a masked word head in the order in which they compute."""

    dense: nn.Module
    activation: Any
    norm: nn.Module
    decoder: nn.Module
    pair: PairHead | None = None


def _bert_head(model: nn.Module) -> WordHead:
    transform = model.cls.predictions.transform
    return WordHead(transform.dense, transform.transform_act_fn, transform.LayerNorm, model.cls.predictions.decoder)


def _with_pairs(output: type, model: nn.Module) -> WordHead:
    pair = PairHead(model.cls.seq_relationship, "next_sentence_label", output, "seq_relationship_logits")
    return _bert_head(model)._replace(pair=pair)


def _roberta_head(model: nn.Module) -> WordHead:
    head = model.lm_head
    return WordHead(head.dense, nn.GELU(), head.layer_norm, head.decoder)


def _albert_head(model: nn.Module) -> WordHead:
    head = model.predictions
    return WordHead(head.dense, head.activation, head.LayerNorm, head.decoder)


def _albert_with_pairs(model: nn.Module) -> WordHead:
    pair = PairHead(model.sop_classifier, "sentence_order_label", albert.AlbertForPreTrainingOutput, "sop_logits")
    return _albert_head(model)._replace(pair=pair)


def _electra_head(model: nn.Module) -> WordHead:
    head = model.generator_predictions
    return WordHead(head.dense, head.activation, head.LayerNorm, model.generator_lm_head)


def _distilbert_head(model: nn.Module) -> WordHead:
    return WordHead(model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector)


WORD_HEADS: dict[type, Callable[[nn.Module], WordHead]] = {
    bert.BertForMaskedLM: _bert_head,
    bert.BertForPreTraining: partial(_with_pairs, bert.BertForPreTrainingOutput),
    ernie.ErnieForMaskedLM: _bert_head,
    ernie.ErnieForPreTraining: partial(_with_pairs, ernie.ErnieForPreTrainingOutput),
    roberta.RobertaForMaskedLM: _roberta_head,
    xlm_roberta.XLMRobertaForMaskedLM: _roberta_head,
    albert.AlbertForMaskedLM: _albert_head,
    albert.AlbertForPreTraining: _albert_with_pairs,
    electra.ElectraForMaskedLM: _electra_head,
    distilbert.DistilBertForMaskedLM: _distilbert_head,
}

# Heads that have a logit for each token, also at padding.
ANSWER_HEADS = (
    bert.BertForQuestionAnswering,
    ernie.ErnieForQuestionAnswering,
    roberta.RobertaForQuestionAnswering,
    xlm_roberta.XLMRobertaForQuestionAnswering,
    albert.AlbertForQuestionAnswering,
    electra.ElectraForQuestionAnswering,
    distilbert.DistilBertForQuestionAnswering,
)
TOKEN_HEADS = (
    bert.BertForTokenClassification,
    ernie.ErnieForTokenClassification,
    roberta.RobertaForTokenClassification,
    xlm_roberta.XLMRobertaForTokenClassification,
    albert.AlbertForTokenClassification,
    electra.ElectraForTokenClassification,
    distilbert.DistilBertForTokenClassification,
)
