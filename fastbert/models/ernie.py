"""ERNIE: BERT whose embeddings may have task types besides, from version 2 on.

Parameters have the names of BERT's, in `ernie` in place of `bert`. Sources: Sun et al., "ERNIE: enhanced representation
through knowledge integration" (2019) and "ERNIE 2.0" (2020).
"""

import dataclasses

from torch import Tensor, nn

from fastbert.models import parameter_names
from fastbert.models.bert import BertConfig, BertForPreTraining, BertForPreTrainingOutput, BertModel
from fastbert.models.encoder import Embeddings, EncoderOutput
from fastbert.models.layers import SmallEmbedding


@dataclasses.dataclass(frozen=True)
class ErnieConfig(BertConfig):
    """Sizes and probabilities of an ERNIE, see `ModelConfig`; presets have the sizes of BERT's.

    `use_task_id` says whether there are embeddings of `task_type_vocab_size` task types.

    Raises:
        ValueError: a value that no ERNIE can have.
    """

    task_type_vocab_size: int = 3
    use_task_id: bool = False


class ErnieEmbeddings(Embeddings):
    """BERT's, and the task type's where the configuration has them. All ids [T] -> [T, H]."""

    def __init__(self, config: ErnieConfig):
        super().__init__(config, config.hidden_size)
        if config.use_task_id:
            self.task_type_embeddings = SmallEmbedding(config.task_type_vocab_size, config.hidden_size)

    def rows(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        task_type_ids: Tensor | None = None,
    ) -> list[tuple[nn.Embedding, Tensor | None]]:
        rows = super().rows(input_ids, token_type_ids, position_ids)
        return [*rows, (self.task_type_embeddings, task_type_ids)] if hasattr(self, "task_type_embeddings") else rows


class ErnieModel(BertModel):
    """The ERNIE encoder with its pooler."""

    config_class, names = ErnieConfig, parameter_names.ERNIE

    def make_embeddings(self, config: ErnieConfig) -> ErnieEmbeddings:
        return ErnieEmbeddings(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        task_type_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
    ) -> EncoderOutput:
        """As `BertModel.forward`, with task types.

        Args:
            task_type_ids: like `input_ids`, in [0, task_type_vocab_size); None is all 0.

        Returns:
            EncoderOutput.

        Raises:
            ValueError, TypeError: as `BertModel.forward`; and task types for a model without their embeddings.
        """
        if task_type_ids is not None and not self.config.use_task_id:
            raise ValueError("this ERNIE has no task types (use_task_id = False): leave task_type_ids out")
        return self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, masked_positions,
            task_type_ids=task_type_ids,
        )  # fmt: skip


class ErnieForPreTraining(BertForPreTraining):
    """ERNIE with BERT's two pretraining heads: masked words (decoder tied to the word embedding) and next sentence."""

    encoder_class, config_class, names = ErnieModel, ErnieConfig, parameter_names.ERNIE
    causal_name = "ErnieForCausalLM"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        task_type_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        """As `BertForPreTraining.forward`, with the task types of `ErnieModel.forward`.

        Returns:
            BertForPreTrainingOutput.

        Raises:
            ValueError, TypeError: as these two.
        """
        return BertForPreTrainingOutput(*self.predict(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, labels,
            next_sentence_label, masked_positions, task_type_ids=task_type_ids,
        ))  # fmt: skip
