"""The models: configuration, encoder and heads, and their folders as `transformers` reads and writes them."""

from fastbert.models.albert import AlbertConfig, AlbertForPreTraining, AlbertModel
from fastbert.models.auto import AutoModel
from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.frozen import freeze

__all__ = [
    "AlbertConfig",
    "AlbertForPreTraining",
    "AlbertModel",
    "AutoModel",
    "BertConfig",
    "BertForPreTraining",
    "BertModel",
    "freeze",
]
