"""LazyAdam, kernels for CPU and GPU, a thin BERT, ALBERT, RoBERTa and ERNIE: training them without wasted work."""

from fastbert.allocator import keep_memory
from fastbert.backends import backends, use_backend
from fastbert.backends.gpu import check_device_errors
from fastbert.backends.linear import use_linear
from fastbert.capture import capture
from fastbert.models.albert import AlbertConfig, AlbertForPreTraining, AlbertModel
from fastbert.models.auto import AutoModel
from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.classification import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    ErnieForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)
from fastbert.models.ernie import ErnieConfig, ErnieForPreTraining, ErnieModel
from fastbert.models.frozen import freeze
from fastbert.models.roberta import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)
from fastbert.ops.attention import attention, attention_qkv
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.dropout import dropout
from fastbert.ops.gelu import gelu
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastbert.ops.linear import linear
from fastbert.optim.gradients import all_gather_ids, all_gather_rows, clip_grad_norm_
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.version import __version__

__all__ = [
    "AlbertConfig",
    "AlbertForPreTraining",
    "AlbertForSequenceClassification",
    "AlbertModel",
    "AutoModel",
    "BertConfig",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertModel",
    "ErnieConfig",
    "ErnieForPreTraining",
    "ErnieForSequenceClassification",
    "ErnieModel",
    "LazyAdam",
    "RobertaConfig",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaModel",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
    "__version__",
    "all_gather_ids",
    "all_gather_rows",
    "attention",
    "attention_qkv",
    "backends",
    "capture",
    "check_device_errors",
    "clip_grad_norm_",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "freeze",
    "gelu",
    "keep_memory",
    "layer_norm",
    "linear",
    "use_backend",
    "use_linear",
]
