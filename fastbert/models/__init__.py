"""The models: configuration, encoder and heads, and their folders as `transformers` reads and writes them."""

from fastbert.models.albert import AlbertConfig, AlbertForPreTraining, AlbertModel
from fastbert.models.auto import AutoModel
from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.classification import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    ErnieForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
    XLNetForSequenceClassification,
)
from fastbert.models.elmo import ElmoConfig, ElmoForPreTraining, ElmoModel
from fastbert.models.ernie import ErnieConfig, ErnieForPreTraining, ErnieModel
from fastbert.models.frozen import freeze
from fastbert.models.roberta import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)
from fastbert.models.xlnet import XLNetConfig, XLNetLMHeadModel, XLNetModel

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
    "ElmoConfig",
    "ElmoForPreTraining",
    "ElmoModel",
    "ErnieConfig",
    "ErnieForPreTraining",
    "ErnieForSequenceClassification",
    "ErnieModel",
    "RobertaConfig",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaModel",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
    "XLNetConfig",
    "XLNetForSequenceClassification",
    "XLNetLMHeadModel",
    "XLNetModel",
    "freeze",
]
