"""Classification and regression of sequences: an encoder's pooled output, dropout, a linear layer.

RoBERTa's head has the pooler within it, with dropout before it too; `_ROBERTA` and `_XLM_ROBERTA` say by which names.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert.models import parameter_names
from fastbert.models.albert import AlbertConfig, AlbertModel
from fastbert.models.bert import BertConfig, BertModel
from fastbert.models.config import ModelConfig
from fastbert.models.encoder import Encoder, ModelWithHead
from fastbert.models.ernie import ErnieConfig, ErnieModel
from fastbert.models.inputs import IGNORED
from fastbert.models.layers import Dropout
from fastbert.models.roberta import RobertaConfig, RobertaModel, XLMRobertaModel
from fastbert.models.xlnet import XLNetConfig, XLNetModel
from fastbert.ops.cross_entropy import cross_entropy

ProblemType = Literal["single_label_classification", "regression"]


class SequenceClassifierOutput(NamedTuple):
    """What a classifier returns.

    Attributes:
        loss: float32 scalar, cross-entropy over labels that are not -100, of a regression the mean squared error; None
            without labels.
        logits: [B, labels].
    """

    loss: Tensor | None
    logits: Tensor


class Labelled:
    """What classifiers have alike, whatever is beneath: their labels, what a folder says of these, and the loss.

    Attributes:
        labels: names of the classes, in the order of the logits; one for a regression.
        problem_type: "single_label_classification" or "regression".
        pairs: whether what is classified are pairs of texts; None where nobody said.
    """

    labels: tuple[str, ...]
    problem_type: ProblemType
    pairs: bool | None

    def set_labels(self, labels: Sequence[str], problem_type: ProblemType, pairs: bool | None = None) -> None:
        """Raises ValueError for another problem type, and for labels that do not fit it."""
        if problem_type not in get_args(ProblemType):
            kinds = " or ".join(get_args(ProblemType))
            raise ValueError(f"problem_type must be {kinds}, got {problem_type!r}: there is no other head here")
        if len(set(labels)) != len(labels) or (len(labels) == 1) != (problem_type == "regression"):
            raise ValueError(f"labels must be two or more names, for a regression one, each once; got {list(labels)}")
        self.labels, self.problem_type, self.pairs = tuple(labels), problem_type, pairs

    def label_fields(self) -> dict[str, Any]:
        """What config.json says of the labels, and of what has them."""
        return {
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        } | ({} if self.pairs is None else {"text_pairs": self.pairs})

    @staticmethod
    def stored_labels(fields: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `set_labels`, from config.json's fields; ValueError where these do not hold."""
        names = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers leaves out
        try:
            labels = [names[key] for key in sorted(names, key=int)]
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"config.json's id2label must name a label for each number, got {names!r}") from error
        kind = "regression" if len(labels) == 1 else "single_label_classification"
        problem_type = fields.get("problem_type") or kind
        return {"labels": labels, "problem_type": problem_type, "pairs": fields.get("text_pairs")}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What `forward` says of its loss: logits [B, labels] and labels [B] -> float32 scalar; raises as that does."""
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must have shape {list(logits.shape[:1])}, got {list(labels.shape)}")
        if self.problem_type == "regression":
            if not labels.is_floating_point():
                raise TypeError(f"labels of a regression must be floating point, got {labels.dtype}")
            return F.mse_loss(logits[:, 0].float(), labels.float())
        return cross_entropy(logits, labels, IGNORED)


class SequenceClassifier(Labelled, ModelWithHead):
    """An encoder with a classifier over each sequence's pooled output.

    Args:
        config: the encoder's configuration.
        labels: names of the classes, in the order of the logits; one for a regression.
        problem_type: "single_label_classification" or "regression".
        classifier_dropout: before the classifier; None takes what the configuration has for it.
        pairs: whether pairs of texts are classified; None where that is not known.
        encoder_options: the encoder's own.

    Raises:
        ValueError: another problem type, labels that do not fit it, or no probability.
    """

    takes_pooler: ClassVar[bool] = True  # from an encoder's folder

    def __init__(
        self,
        config: ModelConfig,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        classifier_dropout: float | None = None,
        pairs: bool | None = None,
        **encoder_options: Any,
    ):
        p = classifier_dropout
        if p is not None and (type(p) not in (int, float) or not 0.0 <= p <= 1.0):
            raise ValueError(f"classifier_dropout is a probability: expected None or a number from 0 to 1, got {p!r}")
        super().__init__(config, **encoder_options)
        self.set_labels(labels, problem_type, pairs)
        self.classifier_dropout = classifier_dropout
        self.dropout = Dropout(self.dropout_p)
        self.classifier = nn.Linear(config.hidden_size, len(labels))
        self.classifier.apply(self._init_weights)

    @property
    def dropout_p(self) -> float:
        usual = getattr(self.config, "classifier_dropout_prob", self.config.hidden_dropout_prob)
        return usual if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def over(
        cls, encoder: Encoder, labels: Sequence[str], problem_type: ProblemType, pairs: bool | None = None
    ) -> "SequenceClassifier":
        """A classifier with a copy of the encoder's weights; a pooler that it lacks is drawn anew, as the head is."""
        model = cls(encoder.config, labels, problem_type, pairs=pairs)
        model.take_encoder(encoder)
        return model

    def take_encoder(self, encoder: Encoder) -> None:
        """Copies the encoder's weights; a pooler that it lacks stays as it is."""
        self.base_model.load_state_dict(encoder.state_dict(), strict=encoder.pooler is not None)

    @classmethod
    def stored_options(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return cls.stored_labels(fields) | {"classifier_dropout": fields.get("classifier_dropout")}

    def fields(self) -> dict[str, Any]:
        return super().fields() | self.label_fields() | {"classifier_dropout": self.classifier_dropout}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classifies sequences; behind its attention the last layer is computed at their first tokens alone.

        Args:
            labels: int64 [B], -100 to ignore; of a regression floating point [B].
            The others are those of `Encoder.forward`.

        Raises:
            ValueError, TypeError: as `Encoder.forward`; labels of another shape or dtype.
        """
        nowhere = torch.empty(0, dtype=torch.int64, device=input_ids.device)
        pooled = self.base_model(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            masked_positions=nowhere,
        ).pooled_output  # fmt: skip
        logits = self.classifier(self.dropout(pooled))
        return SequenceClassifierOutput(None if labels is None else self.loss(logits, labels), logits)


class BertForSequenceClassification(SequenceClassifier):
    """BERT with a classifier over its pooled output; see `SequenceClassifier`."""

    encoder_class, config_class, names = BertModel, BertConfig, parameter_names.BERT


class ErnieForSequenceClassification(SequenceClassifier):
    """ERNIE with a classifier over its pooled output, all task types 0; see `SequenceClassifier`."""

    encoder_class, config_class, names = ErnieModel, ErnieConfig, parameter_names.ERNIE


class AlbertForSequenceClassification(SequenceClassifier):
    """ALBERT with a classifier over its pooled output; see `SequenceClassifier`."""

    encoder_class, config_class, names = AlbertModel, AlbertConfig, parameter_names.ALBERT


# Ours: the encoder's pooler and the classifier. Theirs: two layers of the classifier.
_ROBERTA = parameter_names.ROBERTA._replace(
    renamed=(
        ("roberta.pooler.dense.dense.", "classifier.dense."),
        ("classifier.weight", "classifier.out_proj.weight"),
        ("classifier.bias", "classifier.out_proj.bias"),
    )
)


class RobertaForSequenceClassification(SequenceClassifier):
    """RoBERTa with a classifier of two layers over each sequence's first token; see `SequenceClassifier`."""

    encoder_class, config_class, names = RobertaModel, RobertaConfig, _ROBERTA
    takes_pooler = False

    def __init__(self, config: RobertaConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        pooler = self.base_model.pooler
        pooler["dense"] = nn.Sequential(OrderedDict(dropout=Dropout(self.dropout_p), dense=pooler["dense"]))

    def take_encoder(self, encoder: Encoder) -> None:
        """Its pooler, if any, is left out: the head here is another."""
        state = {name: x for name, x in encoder.state_dict().items() if not name.startswith("pooler.")}
        self.base_model.load_state_dict(state, strict=False)


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    """RoBERTa with a classifier in the folders of XLM-RoBERTa."""

    encoder_class, names = (
        XLMRobertaModel,
        _ROBERTA._replace(
            **{name: getattr(parameter_names.XLM_ROBERTA, name) for name in ("model_type", "title", "article")}
        ),
    )


class XLNetForSequenceClassification(SequenceClassifier):
    """XLNet with a classifier over its summary, a dense layer and a tanh of each sequence's last token.

    `transformers` takes the last place for it, so it is to pad on the left, as the folders' tokenizers say.
    """

    encoder_class, config_class = XLNetModel, XLNetConfig
    names = parameter_names.XLNET._replace(
        renamed=(
            ("transformer.pooler.dense.", "sequence_summary.summary."),
            ("classifier.", "logits_proj."),
            *parameter_names.XLNET.renamed,
        )
    )
    takes_pooler = False  # an encoder's folder has none

    def __init__(self, config: XLNetConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options, add_pooling_layer=True)

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"summary_last_dropout": self.dropout_p}


_CLASSIFIERS = (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    ErnieForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
    XLNetForSequenceClassification,
)
CLASSIFIERS: Mapping[str, type[SequenceClassifier]] = {cls.names.model_type: cls for cls in _CLASSIFIERS}
