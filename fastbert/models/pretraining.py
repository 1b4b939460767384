"""The pretraining heads over an encoder: masked words, and in most models one question about the texts of a pair.

A label of -100 is ignored by both.
"""

import functools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.models import inputs
from fastbert.models.config import ModelConfig
from fastbert.models.encoder import ModelWithHead
from fastbert.models.layers import Dropout, LayerNorm, LinearGELU
from fastbert.ops.cross_entropy import cross_entropy_with_hits
from fastbert.ops.linear import linear, padded_linear
from fastbert.ops.philox import draw_seeds

ROWS = 8  # a GPU's products by 16-bit weights are three times as fast where their numbers of rows are multiples of it


def padded_rows(x: Tensor) -> int:
    return len(x) + -len(x) % ROWS


class Decoder(nn.Module):
    """The word embedding as decoder, with a bias. hidden [M, H] -> [M, V].

    Attributes:
        padded: None, or tensors of which word embeddings and bias are the first V rows, with rows of zeros behind them,
            for a product of as many columns. Logits are then the first V columns of wider ones.
    """

    padded: tuple[Tensor, Tensor] | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        if self.padded is not None:
            return padded_linear(hidden, word_embeddings, self.bias, *self.padded)
        return linear(hidden, word_embeddings, self.bias)


class WordPredictions(Decoder):
    """The masked word head: dense, GELU, LayerNorm, then the decoder. hidden [M, H] -> [M, V]."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__(config)
        dense = LinearGELU(config.hidden_size, size, config.approximate)
        norm = LayerNorm(size, config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        return super().forward(self.transform["LayerNorm"](self.transform["dense"](hidden)), word_embeddings)


class Predictions(NamedTuple):
    """Losses and logits of both heads, in the order of the models' outputs; a loss is None where labels were not given.

    What is the sentence head's is None in a model that has none.

    Attributes:
        loss: float32 scalar, the sum of the losses below.
        mlm_loss: float32 scalar, the mean over labels that are not ignored; 0 where there are none.
        sentence_loss: float32 scalar, likewise over sequences.
        prediction_logits: [M, V] at the labelled positions in order; without labels at all: [B, S, V] or [T, V].
        sentence_logits: [B, 2].
        hits: of words and, with its labels, of the sentence head, float32 [2] each: how many predictions are right and
            how many there are, see `cross_entropy_with_hits`; empty without labels.
    """

    loss: Tensor | None
    mlm_loss: Tensor | None
    sentence_loss: Tensor | None
    prediction_logits: Tensor
    sentence_logits: Tensor | None
    hits: tuple[Tensor, ...] = ()


class PreTrainingModel(ModelWithHead):
    """An encoder with its heads; a subclass has `predictions` and, if any, `sentence_head`."""

    # The argument of `forward` that holds the sentence head's labels; None for a model without that head.
    sentence_label: ClassVar[str | None]
    fills_gaps: ClassVar[bool] = True  # whether [MASK] in the text stands for a word to be predicted
    predictions: Decoder
    sentence_head: nn.Module | None = None

    @property
    def word_embeddings(self) -> nn.Parameter:
        """The table that the input is looked up in and that decodes predictions, a row per word."""
        return self.base_model.embeddings.word_embeddings.weight

    def skip_seeds(self, passes: int, device: torch.device | str) -> None:
        """Draws from torch's generator what so many forward passes would, so that others may compute them elsewhere."""
        heads = [] if self.sentence_head is None or not self.training else self.sentence_head.modules()
        dropped = [module.p for module in heads if isinstance(module, Dropout)]
        for _ in range(passes):
            self.base_model.skip_seeds(torch.device(device))
            draw_seeds(dropped, torch.device(device))

    def word_logits(self, ids: Tensor, place: int, mask_id: int, **types: Tensor) -> Tensor:
        """What the model says of the token at `place` of one sequence, ids [S], without seeing it: [V].

        A decoder does not see what follows either. `types` are those of the tokens, like `ids`.
        """
        if not self.config.is_decoder:
            ids = ids.index_fill(0, torch.tensor([place], device=ids.device), mask_id)
        out = self(ids.unsqueeze(0), **{name: x.unsqueeze(0) for name, x in types.items()})
        return out.prediction_logits[0, place - int(self.config.is_decoder)]

    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        labels: Tensor | None,
        sentence_label: Tensor | None,
        masked_positions: Tensor | None,
        **more: Tensor | None,
    ) -> Predictions:
        """What `forward` says of its arguments; `more` as in `Encoder.encode`."""
        named = {} if self.sentence_label is None else {self.sentence_label: sentence_label}
        inputs.check_targets(self.config, input_ids, cu_seqlens, labels, named, masked_positions)
        if labels is not None and masked_positions is None:
            masked_positions = (labels.flatten() != inputs.IGNORED).nonzero().squeeze(1)
            labels = labels.flatten().index_select(0, masked_positions)
        hidden, pooled = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            masked_positions=masked_positions,
            **more,
        )
        if labels is not None and attention_mask is not None:
            padding = attention_mask.flatten().index_select(0, masked_positions) == 0
            labels = labels.masked_fill(padding, inputs.IGNORED)

        logits = self.predictions(hidden.flatten(0, -2), self.base_model.embeddings.word_embeddings.as_decoder())
        logits = logits.view(*hidden.shape[:-1], logits.shape[1])
        sentence_logits = None if self.sentence_head is None else self.sentence_head(pooled)

        heads = [(logits, labels), (sentence_logits, sentence_label)]
        scores = [(None, None) if y is None else cross_entropy_with_hits(x, y, inputs.IGNORED) for x, y in heads]
        losses = [loss for loss, _ in scores]
        given = [loss for loss in losses if loss is not None]
        loss = functools.reduce(torch.add, given) if given else None
        hits = tuple(hits for _, hits in scores if hits is not None)
        return Predictions(loss, *losses, logits, sentence_logits, hits)
