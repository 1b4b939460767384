"""The classes of every architecture, and the one that a folder's configuration names."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from fastbert.models import checkpoint
from fastbert.models.albert import AlbertForPreTraining, AlbertModel
from fastbert.models.bert import BertForPreTraining, BertModel
from fastbert.models.elmo import ElmoForPreTraining, ElmoModel
from fastbert.models.encoder import Encoder, PreTrainedModel
from fastbert.models.ernie import ErnieForPreTraining, ErnieModel
from fastbert.models.pretraining import PreTrainingModel
from fastbert.models.roberta import RobertaForMaskedLM, RobertaModel, XLMRobertaForMaskedLM, XLMRobertaModel
from fastbert.models.xlnet import XLNetLMHeadModel, XLNetModel

_ENCODERS = AlbertModel, BertModel, ErnieModel, RobertaModel, XLMRobertaModel, XLNetModel
_PRETRAINING = (
    AlbertForPreTraining, BertForPreTraining, ErnieForPreTraining, RobertaForMaskedLM, XLMRobertaForMaskedLM,
    XLNetLMHeadModel,
)  # fmt: skip

# By model_type in config.json.
ENCODERS: Mapping[str, type[Encoder]] = {cls.names.model_type: cls for cls in _ENCODERS}
PRETRAINING: Mapping[str, type[PreTrainingModel]] = {cls.names.model_type: cls for cls in _PRETRAINING}
# With the models that are no encoders: what `fastbert pretrain` trains.
PRETRAINED: Mapping[str, type[PreTrainingModel | ElmoForPreTraining]] = {**PRETRAINING, "elmo": ElmoForPreTraining}

Model = TypeVar("Model", bound=PreTrainedModel)


class AutoModel:
    """Loads the encoder of any Hugging Face folder whose architecture this package has."""

    @staticmethod
    def from_pretrained(folder: str | os.PathLike, **options: Any) -> Encoder | ElmoModel:
        """The encoder in `folder`, of the class that `model_type` in config.json names, as that loads it.

        An old config.json without `model_type` goes by the class that its `architectures` name, else it is a BERT's.

        Args:
            folder: a Hugging Face folder.
            options: the class's own, such as `add_pooling_layer=False`; an ELMo has none, and leaves them out.

        Raises:
            FileNotFoundError: no such folder, or a file is missing from it.
            ValueError: an architecture that is not here; the message names those that are. And as the class itself.
        """
        kind = class_of(folder, {**ENCODERS, "elmo": ElmoModel})
        return kind.from_pretrained(folder, **({} if kind is ElmoModel else options))


def class_of(folder: str | os.PathLike, classes: Mapping[str, type[Model]]) -> type[Model]:
    """The one of these classes that is of the architecture in `folder`; raises as `AutoModel.from_pretrained`."""
    fields = checkpoint.read_config(folder)
    named, kind = fields.get("architectures") or [], fields.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in (*named, kind or "")):
        raise ValueError(
            f"{folder}: config.json must name its architecture by model_type, a string, or architectures, a list "
            f"of strings; got {kind!r} and {named!r}"
        )
    titled = (name for name, cls in classes.items() if named and named[0].startswith(cls.names.title))
    kind = kind or next(titled, "" if named else BertModel.names.model_type)
    if kind == "elmo" and kind not in classes:
        raise ValueError(
            f"{folder} holds an ELMo, which has no attention, no [MASK] and no layers to fine-tune here: fastbert "
            "embed gives its vectors, and fastbert finetune --features trains a classifier on them"
        )
    if kind not in classes:
        raise ValueError(
            f"{folder} holds a model of the architecture {kind or named!r}: expected one of {', '.join(classes)}"
        )
    return classes[kind]
