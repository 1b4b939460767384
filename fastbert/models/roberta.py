"""RoBERTa: BERT's encoder with positions that start behind the padding id, masked words to predict and nothing else.

XLM-RoBERTa is the same model with another vocabulary. Parameters have Hugging Face's names but within the masked word
head; `parameter_names.ROBERTA` says which are which. Sources: Liu et al., "RoBERTa" (2019); Conneau et al.,
"Unsupervised cross-lingual representation learning at scale" (2020).
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from fastbert.models import parameter_names
from fastbert.models.bert import BertConfig, BertModel
from fastbert.models.pretraining import PreTrainingModel, WordPredictions


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes and probabilities of a RoBERTa, see `ModelConfig`; defaults are those of the published models.

    The position table has `pad_token_id` + 1 rows that no token takes, so with 514 rows a sequence has 512 tokens.
    Presets have the sizes of BERT's.

    Raises:
        ValueError: a value that no RoBERTa can have.
    """

    vocab_size: int = 50265
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        if self.pad_token_id is None or self.pad_token_id + 1 >= self.max_position_embeddings:
            raise ValueError(
                "positions start behind pad_token_id: expected an id of at most max_position_embeddings - 2 = "
                f"{self.max_position_embeddings - 2}, got {self.pad_token_id!r}"
            )

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1


class MaskedLMOutput(NamedTuple):
    """What `RobertaForMaskedLM` returns.

    Attributes:
        loss: float32 scalar, the mean over labels that are not ignored, 0 where there are none; None without labels.
        logits: [M, V] at the labelled positions in order; without labels at all: [B, S, V] or [T, V].
        hits: one float32 [2]: how many predictions are right and how many there are, see `cross_entropy_with_hits`;
            empty without labels.
    """

    loss: Tensor | None
    logits: Tensor
    hits: tuple[Tensor, ...] = ()

    @property
    def mlm_loss(self) -> Tensor | None:
        """The loss by the name that every model has for it; and so below."""
        return self.loss

    @property
    def prediction_logits(self) -> Tensor:
        return self.logits

    @property
    def sentence_loss(self) -> None:
        return None

    @property
    def sentence_logits(self) -> None:
        return None


class RobertaModel(BertModel):
    """The RoBERTa encoder with its pooler, which the published models lack: `add_pooling_layer=False` leaves it out.

    Where no position ids are given, a sequence's tokens count from `pad_token_id` + 1, left out those that are
    `pad_token_id`, wherever the padding stands.
    """

    config_class, names = RobertaConfig, parameter_names.ROBERTA


class RobertaForMaskedLM(PreTrainingModel):
    """RoBERTa, without a pooler, and its pretraining head: masked words, the decoder tied to the word embedding."""

    encoder_class, sentence_label, causal_name = RobertaModel, None, "RobertaForCausalLM"
    config_class, names = RobertaConfig, parameter_names.ROBERTA

    def __init__(self, config: RobertaConfig):
        super().__init__(config, add_pooling_layer=False)
        # The head's GELU is the exact one, whatever the layers' is.
        self.lm_head = WordPredictions(dataclasses.replace(config, hidden_act="gelu"), config.hidden_size)
        self.lm_head.apply(self._init_weights)

    @property
    def predictions(self) -> WordPredictions:
        return self.lm_head

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
        masked_positions: Tensor | None = None,
    ) -> MaskedLMOutput:
        """As `BertForPreTraining.forward` without its question about pairs.

        Returns:
            MaskedLMOutput.

        Raises:
            ValueError, TypeError: as `BertForPreTraining.forward`.
        """
        out = self.predict(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, labels, None,
            masked_positions,
        )  # fmt: skip
        return MaskedLMOutput(out.mlm_loss, out.prediction_logits, out.hits)


class XLMRobertaModel(RobertaModel):
    """RoBERTa's encoder in the folders of XLM-RoBERTa."""

    names = parameter_names.XLM_ROBERTA


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    """RoBERTa for masked words in the folders of XLM-RoBERTa."""

    encoder_class, names = XLMRobertaModel, parameter_names.XLM_ROBERTA
    causal_name = "XLMRobertaForCausalLM"
