"""The models: configuration, encoder and heads, and their folders as `transformers` reads and writes them."""

from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel
from fastbert.models.layers import freeze

__all__ = ["BertConfig", "BertForPreTraining", "BertModel", "freeze"]
