"""A classifier over the features of a frozen model: a learned mix of its layers, the mean over tokens, a linear layer.

    mix = gamma * sum_l softmax(s)_l mean_t(h_l[t])              s [L + 1] and gamma are learned, h_0 are the embeddings
    logits = dropout(mix) W^T + b

The model stays as it is, so a text's means [L + 1, H] are computed once and serve every epoch. Source of the mix:
Peters et al., "Deep contextualized word representations" (2018).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.auto import ENCODERS, AutoModel
from fastbert.models.checkpoint import OWN
from fastbert.models.classification import Labelled, ProblemType, SequenceClassifierOutput
from fastbert.models.elmo import ElmoModel
from fastbert.models.encoder import Encoder
from fastbert.models.layers import Dropout
from fastbert.models.own_folder import OwnFolder


def hidden_states(model: Encoder | ElmoModel, packed: Mapping[str, Tensor | int]) -> Sequence[Tensor]:
    """The embeddings and every layer's output, [T, H] each; `packed` are the arguments of the model's `forward`."""
    if isinstance(model, ElmoModel):
        return model(**packed).hidden_states
    states: list[Tensor] = []
    layers = list(model.layers())  # an ALBERT's are all the same module

    def before(module: torch.nn.Module, arguments: tuple) -> None:
        states.append(arguments[0])

    def behind(module: torch.nn.Module, arguments: tuple, out: tuple[Tensor, Tensor]) -> None:
        if len(states) == len(layers):
            states.append(out[0])

    hooks = [layer.register_forward_pre_hook(before) for layer in set(layers)]
    hooks += [layer.register_forward_hook(behind) for layer in set(layers)]
    try:
        model(**packed)
    finally:
        for hook in hooks:
            hook.remove()
    return states


class ScalarMix(nn.Module):
    """gamma times the mean of layers weighted by a softmax: [B, layers, H] -> [B, H]; at first their plain mean."""

    def __init__(self, layers: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.einsum("l,blh->bh", self.scores.softmax(0), x)


class FeatureClassifier(Labelled, OwnFolder):
    """Classes or a number of texts from the features of a frozen model, see the module.

    Args:
        encoder: BERT, ALBERT, RoBERTa, ERNIE or ELMo; without a pooler. It takes no gradient and no dropout.
        labels: names of the classes, in the order of the logits; one for a regression.
        problem_type: "single_label_classification" or "regression".
        dropout: probability, on the mix.
        pairs: whether pairs of texts are classified; None where that is not known.

    Raises:
        ValueError: another problem type, or labels that do not fit it.
    """

    model_type = "fastbert-features"

    def __init__(
        self,
        encoder: Encoder | ElmoModel,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        dropout: float = 0.1,
        pairs: bool | None = None,
    ):
        super().__init__(encoder.config)
        self.set_labels(labels, problem_type, pairs)
        self.encoder = encoder.requires_grad_(False).eval()
        self.mix = ScalarMix(1 + self.config.num_hidden_layers)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(self.config.hidden_size, len(labels))

    def train(self, mode: bool = True) -> "FeatureClassifier":
        """Of the head alone: the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def means(self, cu_seqlens: Tensor, **packed: Tensor | int) -> Tensor:
        """Of each packed text the mean of each layer over its tokens, float32 [B, L + 1, H]."""
        states = hidden_states(self.encoder, {"cu_seqlens": cu_seqlens, **packed})
        stacked = torch.stack([state.float() for state in states], 1)  # [T, L + 1, H]
        return torch.segment_reduce(stacked, "mean", lengths=cu_seqlens.diff().long(), initial=0.0)

    def head(self, means: Tensor) -> Tensor:
        """What `means` gives -> logits [B, labels]."""
        return self.classifier(self.dropout(self.mix(means)))

    def forward(
        self, input_ids: Tensor, *, cu_seqlens: Tensor, labels: Tensor | None = None, **packed: Tensor | int
    ) -> SequenceClassifierOutput:
        """Classifies packed texts; the arguments are those of `SequenceClassifier.forward`, and raise as there."""
        logits = self.head(self.means(cu_seqlens, input_ids=input_ids, **packed))
        return SequenceClassifierOutput(None if labels is None else self.loss(logits, labels), logits)

    def fields(self) -> dict[str, Any]:
        """config.json: the labels, and the encoder's own fields within."""
        own = {"architectures": [type(self).__name__], "model_type": self.model_type, "dropout": self.dropout.p}
        inner = self.encoder.fields() | {"model_type": self.encoder.names.model_type}
        return own | self.label_fields() | {"encoder": inner}

    @property
    def loaded_by(self) -> str:
        return f"{super().loaded_by}; transformers has no such model"

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "FeatureClassifier":
        inner = fields["encoder"]
        kind = {**ENCODERS, "elmo": ElmoModel}[inner["model_type"]]
        options = {} if kind is ElmoModel else {"add_pooling_layer": False}
        encoder = kind(kind.config_class.from_fields(inner), **options)
        return cls(encoder, **cls.stored_labels(fields), dropout=fields["dropout"])

    @classmethod
    def over(cls, folder: str | os.PathLike, *arguments: Any) -> "FeatureClassifier":
        """A new head over the encoder in `folder`; raises as `AutoModel.from_pretrained`."""
        return cls(AutoModel.from_pretrained(folder, add_pooling_layer=False), *arguments)


KIND = FeatureClassifier.model_type.removeprefix(OWN)  # as `checkpoint.read_config` says it
