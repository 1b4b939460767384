"""Classifiers of texts that are no transformers: TextCNN and BiLSTM, over word embeddings of their own.

They take what the encoders take, packed or padded, and what is padding changes no number. Inside, a batch is padded:
its texts are short and come sorted by length. Sources: Kim, "Convolutional neural networks for sentence classification"
(2014); Tang, Lu, Liu, Mou, Vechtomova and Lin, "Distilling task-specific knowledge from BERT into simple neural
networks" (2019), whose BiLSTM this is but for its pooling, a maximum over time as in the TextCNN.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastbert.backends.attention import check_sequences
from fastbert.models.classification import Labelled, ProblemType, SequenceClassifierOutput
from fastbert.models.own_folder import OwnFolder
from fastbert.models.recurrent import turned_places
from fastbert.ops.checks import check_tensor


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    """Sizes of a small classifier.

    Attributes:
        vocab_size: rows of the word embeddings. embedding_size: their columns.
        width: a BiLSTM's numbers of each direction, a TextCNN's filters of each window.
        windows: of a TextCNN, in tokens.
        max_length: tokens of the longest text that it is given; it has no table that would run out.
        pad_token_id: the row that stays 0; None for none.
        dropout: probability, on the embeddings and on what is pooled.

    Raises:
        ValueError: a size below 1, no window, a padding that is no id, or no probability.
    """

    vocab_size: int
    embedding_size: int = 128
    width: int = 128
    windows: tuple[int, ...] = (3, 4, 5)
    max_length: int = 512
    pad_token_id: int | None = 0
    dropout: float = 0.5

    type_vocab_size: ClassVar[int] = 1
    padding_side: ClassVar[str] = "right"

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(self.windows))
        sizes = {name: getattr(self, name) for name in ("vocab_size", "embedding_size", "width", "max_length")}
        for name, value in sizes.items() | {("windows", window) for window in self.windows or (0,)}:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer from 1 on, got {value!r}")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id must be None or an id in the vocabulary of {self.vocab_size}, got {pad!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability below 1, got {self.dropout!r}")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration in a config.json's fields, of which others are left out; raises as the class does."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})

    @property
    def longest(self) -> int:
        return self.max_length


class SmallClassifier(Labelled, OwnFolder):
    """What both have: the embeddings, the linear layer at the end, and folders; a subclass has `features`.

    Args:
        config: sizes.
        labels: names of the classes, in the order of the logits; one for a regression.
        problem_type: "single_label_classification" or "regression".
        pairs: whether pairs of texts are classified; None where that is not known.

    Raises:
        ValueError: another problem type, or labels that do not fit it.
    """

    config_class = SmallConfig

    def __init__(
        self,
        config: SmallConfig,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        pairs: bool | None = None,
    ):
        super().__init__(config)
        self.set_labels(labels, problem_type, pairs)
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id, sparse=True
        )
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.add_layers(), len(labels))
        with torch.no_grad():
            self.word_embeddings.weight.normal_(std=0.1)
            if config.pad_token_id is not None:
                self.word_embeddings.weight[config.pad_token_id] = 0.0

    def add_layers(self) -> int:
        """Makes what lies between embeddings and classifier; returns the columns of `features`."""
        raise NotImplementedError

    def features(self, x: Tensor, mask: Tensor) -> Tensor:
        """Embedded texts [B, S, E], zeros at padding, and mask, bool [B, S] -> [B, S, columns] for the maximum."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classifies texts.

        Args:
            input_ids: int64 [B, S], or packed [T] with `cu_seqlens`.
            attention_mask: bool or integer [B, S], 0 at padding, which stands behind a text; None for no padding.
            token_type_ids: not looked at.
            cu_seqlens: int32 [B + 1], where each packed text starts, and T.
            max_seqlen: not looked at.
            labels: int64 [B], -100 to ignore; of a regression floating point [B].

        Returns:
            SequenceClassifierOutput. A text without tokens has the classifier's bias for logits.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, boundaries that do not make up the tokens, padding
                that stands before a token.
        """
        check_tensor("input_ids", input_ids)
        if cu_seqlens is not None:
            input_ids, attention_mask = self._padded(input_ids, cu_seqlens)
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be [B, S], or packed [T] together with cu_seqlens; got shape {list(input_ids.shape)}"
            )
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {list(input_ids.shape)}, got {list(mask.shape)}"
            )
        looked_at = attention_mask is not None and cu_seqlens is None and not torch.compiler.is_compiling()
        if looked_at and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("padding must stand behind a text: the attention_mask of each is ones, then zeros")
        x = self.dropout(self.word_embeddings(input_ids)) * mask.unsqueeze(2)
        x = self.features(x, mask).masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)
        x = torch.where(mask.any(1, keepdim=True), x, 0.0)
        logits = self.classifier(self.dropout(x))
        return SequenceClassifierOutput(None if labels is None else self.loss(logits, labels), logits)

    def _padded(self, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """A packed batch as ids and mask [B, S]."""
        if input_ids.dim() != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
            raise ValueError(
                f"with cu_seqlens [B + 1], input_ids must be packed [T], got shapes {list(cu_seqlens.shape)} and "
                f"{list(input_ids.shape)}"
            )
        lengths = cu_seqlens.diff().long()
        check_sequences(cu_seqlens, len(input_ids), len(input_ids))
        texts = input_ids.split(lengths.tolist())
        ids = pad_sequence(texts, batch_first=True, padding_value=self.config.pad_token_id or 0)
        return ids, torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)

    @property
    def base_model(self) -> Self:
        return self

    def fields(self) -> dict[str, Any]:
        return super().fields() | self.label_fields()

    @classmethod
    def stored_options(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return cls.stored_labels(fields)


class TextCNN(SmallClassifier):
    """Filters over windows of some tokens, ReLU, and each filter's largest value; see `SmallClassifier`."""

    model_type = "fastbert_textcnn"

    def add_layers(self) -> int:
        sizes = self.config
        self.convolutions = nn.ModuleList(nn.Conv1d(sizes.embedding_size, sizes.width, w) for w in sizes.windows)
        return sizes.width * len(sizes.windows)

    def features(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # [B, E, S]; a window has zeros beyond the text, whether it is padded or not
        found = [
            convolution(F.pad(x, ((window - 1) // 2, window // 2)))
            for convolution, window in zip(self.convolutions, self.config.windows, strict=True)
        ]
        return torch.relu(torch.cat(found, 1)).transpose(1, 2)


class BiLSTM(SmallClassifier):
    """An LSTM over each text, another over the text reversed, and the largest of each output; see `SmallClassifier`.

    These are two LSTMs of one direction, and each text is turned around within its own length. Behind its end both
    see padding, which cannot reach back. torch's own of two directions would begin with the padding, unless it is given
    its packed form, which on a CPU is several times slower and which ONNX does not have.
    """

    model_type = "fastbert_bilstm"

    def add_layers(self) -> int:
        sizes = self.config
        self.forth, self.back = (nn.LSTM(sizes.embedding_size, sizes.width, batch_first=True) for _ in range(2))
        return 2 * sizes.width

    def features(self, x: Tensor, mask: Tensor) -> Tensor:
        turned = turned_places(mask.sum(1), x.shape[1]).unsqueeze(2)
        back, _ = self.back(x.gather(1, turned.expand(-1, -1, x.shape[2])))
        forth, _ = self.forth(x)
        return torch.cat([forth, back.gather(1, turned.expand(-1, -1, back.shape[2]))], 2)


SMALL: Mapping[str, type[SmallClassifier]] = {cls.model_type: cls for cls in (TextCNN, BiLSTM)}
