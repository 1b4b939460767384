"""`fastbert.models.bert` under the name it had before there was a family of models."""

from fastbert.models.bert import BertConfig, BertForPreTraining, BertModel

__all__ = ["BertConfig", "BertForPreTraining", "BertModel"]
