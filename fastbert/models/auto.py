"""The classes of every architecture, and the one that a folder's configuration names."""

import os
from collections.abc import Mapping

from fastbert.models import checkpoint
from fastbert.models.albert import AlbertForPreTraining, AlbertModel
from fastbert.models.bert import BertForPreTraining, BertModel
from fastbert.models.encoder import Encoder
from fastbert.models.pretraining import PreTrainingModel

ENCODERS: Mapping[str, type[Encoder]] = {"albert": AlbertModel, "bert": BertModel}
PRETRAINING: Mapping[str, type[PreTrainingModel]] = {"albert": AlbertForPreTraining, "bert": BertForPreTraining}


class AutoModel:
    """Loads the encoder of any Hugging Face folder whose architecture this package has."""

    @staticmethod
    def from_pretrained(folder: str | os.PathLike) -> Encoder:
        """The encoder in `folder`, of the class that `model_type` in config.json names, as that loads it.

        An old config.json without `model_type` goes by the class that its `architectures` name, else it is a BERT's.

        Raises:
            FileNotFoundError: no such folder, or a file is missing from it.
            ValueError: an architecture that is not here; the message names those that are. And as the class itself.
        """
        fields = checkpoint.read_config(folder)
        classes, kind = fields.get("architectures") or [], fields.get("model_type")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in (*classes, kind or "")):
            raise ValueError(
                f"{folder}: config.json must name its architecture by model_type, a string, or architectures, a list "
                f"of strings; got {kind!r} and {classes!r}"
            )
        named = (name for name, cls in ENCODERS.items() if classes and classes[0].startswith(cls.names.title))
        kind = kind or next(named, "" if classes else BertModel.names.model_type)
        if kind not in ENCODERS:
            raise ValueError(
                f"{folder} holds a model of the architecture {kind or classes!r}: expected one of {', '.join(ENCODERS)}"
            )
        return ENCODERS[kind].from_pretrained(folder)
