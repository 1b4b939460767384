"""BERT: a stack of layers, each with weights of its own, and the two pretraining heads.

Modules and parameters carry the names that Hugging Face gives them, except that query, key and value are one matrix
(`attention.self.qkv`). Source: Devlin, Chang, Lee and Toutanova, "BERT" (2019).
"""

import dataclasses
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from fastbert.models import parameter_names
from fastbert.models.config import ModelConfig, sizes
from fastbert.models.encoder import Embeddings, Encoder, Layer
from fastbert.models.layers import Linear
from fastbert.models.pretraining import PreTrainingModel, WordPredictions


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Sizes and probabilities of a BERT, see `ModelConfig`; presets "tiny", "mini", "small", "base" and "large"."""

    presets: ClassVar[dict[str, dict[str, int]]] = {
        "tiny": sizes(2, 128, 2),
        "mini": sizes(4, 256, 4),
        "small": sizes(4, 512, 8),
        "base": sizes(12, 768, 12),
        "large": sizes(24, 1024, 16),
    }


class BertForPreTrainingOutput(NamedTuple):
    """What `BertForPreTraining` returns; a loss is None where its labels were not given.

    Attributes:
        loss: float32 scalar, the sum of the two below.
        mlm_loss: float32 scalar, the mean over labels that are not ignored; 0 where there are none.
        nsp_loss: float32 scalar, likewise over sequences.
        prediction_logits: [M, V] at the labelled positions in order; without labels at all: [B, S, V] or [T, V].
        seq_relationship_logits: [B, 2].
        hits: of words and, with its labels, of the sentence head, float32 [2] each: how many predictions are right and
            how many there are, see `cross_entropy_with_hits`; empty without labels.
    """

    loss: Tensor | None
    mlm_loss: Tensor | None
    nsp_loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hits: tuple[Tensor, ...] = ()

    @property
    def sentence_loss(self) -> Tensor | None:
        """The sentence head's, by the name that every model has for it."""
        return self.nsp_loss

    @property
    def sentence_logits(self) -> Tensor:
        return self.seq_relationship_logits


class BertModel(Encoder):
    """The BERT encoder with its pooler.

    Weights start as N(0, initializer_range), biases as 0, LayerNorm as 1 and 0, the padding token's embedding as 0.
    """

    config_class, names = BertConfig, parameter_names.BERT

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = self.make_embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)})
        self.pooler = pooler if add_pooling_layer else None
        self.apply(self._init_weights)

    def make_embeddings(self, config: BertConfig) -> Embeddings:
        return Embeddings(config, config.hidden_size)

    def embed(self, *ids: Tensor | None, seed: Tensor | None, **more: Tensor | None) -> Tensor:
        return self.embeddings(*ids, seed=seed, **more)

    def layers(self) -> nn.ModuleList:
        return self.encoder["layer"]

    def pool(self, first: Tensor) -> Tensor:
        return self.pooler["dense"](first)


class BertForPreTraining(PreTrainingModel):
    """BERT with its two pretraining heads: masked words (decoder tied to the word embedding) and next sentence."""

    encoder_class, sentence_label, causal_name = BertModel, "next_sentence_label", "BertLMHeadModel"
    config_class, names = BertConfig, parameter_names.BERT

    def __init__(self, config: BertConfig):
        super().__init__(config)
        words = WordPredictions(config, config.hidden_size)
        self.cls = nn.ModuleDict({"predictions": words, "seq_relationship": nn.Linear(config.hidden_size, 2)})
        self.cls.apply(self._init_weights)

    @property
    def predictions(self) -> WordPredictions:
        return self.cls["predictions"]

    @property
    def sentence_head(self) -> nn.Linear:
        return self.cls["seq_relationship"]

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
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        """Encodes as `BertModel.forward` does, and predicts words at the labelled positions only.

        Both losses are means over this batch's own labels. To accumulate micro-batches of unequal size, weight each
        `mlm_loss` by its share of the step's labels and each `nsp_loss` by its share of the step's sequences.

        Args:
            labels: int64, the true word or -100 to ignore the place: like `input_ids`, or [M] with
                `masked_positions`. Without `masked_positions` they are looked at once, so on a GPU it waits for the
                device. Labels at padding are ignored.
            next_sentence_label: int64 [B], 0 where the second text follows the first, 1 where it is random, -100 to
                ignore.
            masked_positions: int64 [M], where to predict: places in the packed tokens, or in the padded batch read as
                [B * S].

        Returns:
            BertForPreTrainingOutput.

        Raises:
            ValueError, TypeError: as `BertModel.forward`; and labels or positions of the wrong shape, dtype or range.
        """
        return BertForPreTrainingOutput(*self.predict(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, labels,
            next_sentence_label, masked_positions,
        ))  # fmt: skip
