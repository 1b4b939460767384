"""XLNet: words predicted in a random order, by two streams of attention that are one longer sequence here.

A content token sees itself and what comes before it in the order; a query stands where a word is to be predicted, knows
the place but not the word (its input is `mask_emb`), and sees what comes strictly before. Both streams pass the same
weights, so a query is a token more, behind those of its sequence, with the place of the token that it predicts, and
seen by nobody: `UNSEEN`. Which key a query sees is a matter of ranks, `key rank <= query rank`, of which the kernels
know; there is no mask of S x S.

Its positions are relative, see `relative`. The folders' names and shapes are those of `transformers`, see
`parameter_names.XLNET`. Memories (`mems`) there are none. Dropout stands where BERT's does; `transformers` drops on the
sinusoids, within the feed-forward network and behind the last layer too.
Source: Yang, Dai, Yang, Carbonell, Salakhutdinov and Le, "XLNet" (2019).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastbert.models import inputs, parameter_names
from fastbert.models.config import ModelConfig, sizes
from fastbert.models.encoder import Encoder, EncoderOutput, Layer
from fastbert.models.layers import Dropout, Linear, WordEmbedding
from fastbert.models.pretraining import Decoder, PreTrainingModel
from fastbert.models.relative import SEGMENTS, Relative, RelativeAttention
from fastbert.models.roberta import MaskedLMOutput
from fastbert.models.two_streams import UNSEEN, TwoStreams
from fastbert.ops.checks import wide

LONGEST = 1 << 16  # tokens of a sequence, with its queries: there is no position table that would limit it
ROUNDED_TO = 16  # places, so that products have few shapes and rows begin at whole vectors
# Ours, theirs; one probability there is two here.
_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_inner",
    "hidden_act": "ff_activation",
    "hidden_dropout_prob": "dropout",
}
_SAME = "vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id"
_USUAL = {"is_decoder": False, "attention_window": None, "attention_kind": "soft", "norm": "layer"}


@dataclasses.dataclass(frozen=True)
class XLNetConfig(ModelConfig):
    """Sizes and probabilities of an XLNet, see `ModelConfig`; defaults are those of the published base model.

    A folder's config.json has `transformers`' names for them: `d_model`, `n_layer`, `n_head`, `d_inner`,
    `ff_activation` and `dropout`, which is both probabilities. `attn_type` is "bi" there, `bi_data` False and
    `clamp_len` -1, or the folder is refused; `mem_len` and `reuse_len` are written as None. Token types are segments:
    whether two tokens are of the same is all that counts. There is no position table, and `max_position_embeddings` is
    left as it is. Presets have the sizes of BERT's.

    Raises:
        ValueError: a value that no XLNet can have.
    """

    vocab_size: int = 32000
    max_position_embeddings: int = LONGEST
    type_vocab_size: int = SEGMENTS
    pad_token_id: int | None = 5

    has_position_table: ClassVar[bool] = False
    padding_side: ClassVar[str] = "left"  # transformers' classifier takes the last place
    presets: ClassVar[dict[str, dict[str, int]]] = {
        "tiny": sizes(2, 128, 2),
        "mini": sizes(4, 256, 4),
        "small": sizes(4, 512, 8),
        "base": sizes(12, 768, 12),
        "large": sizes(24, 1024, 16),
    }

    def __post_init__(self):
        super().__post_init__()
        for name, usual in _USUAL.items():
            if getattr(self, name) != usual:
                raise ValueError(f"an XLNet has {name} = {usual!r} only, got {getattr(self, name)!r}: leave it out")
        fixed = {"max_position_embeddings": LONGEST, "type_vocab_size": SEGMENTS}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"an XLNet has no {name}: leave it out, got {getattr(self, name)}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even, a sine and a cosine each, got {self.hidden_size}")
        if self.hidden_dropout_prob != self.attention_probs_dropout_prob:
            raise ValueError(
                "an XLNet has one probability of dropout: hidden_dropout_prob and attention_probs_dropout_prob must be "
                f"equal, got {self.hidden_dropout_prob} and {self.attention_probs_dropout_prob}"
            )

    def attention_columns(self, length: float = math.inf) -> float:
        return self.hidden_size + self.num_attention_heads * (min(self.hidden_size, length) + SEGMENTS)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        named = {ours: fields[theirs] for ours, theirs in _FIELDS.items() if theirs in fields}
        named |= {name: fields[name] for name in _SAME if name in fields}
        if "dropout" in fields:
            named["attention_probs_dropout_prob"] = fields["dropout"]
        return cls(**named)

    def to_fields(self) -> dict[str, Any]:
        named = {theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()}
        return named | {name: getattr(self, name) for name in _SAME} | {"mem_len": None, "reuse_len": None}


class XLNetLayer(Layer):
    """Relative attention, then the feed-forward network, see `Layer`."""

    def __init__(self, config: XLNetConfig):
        heads = RelativeAttention(config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob)
        super().__init__(config, heads, bias=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        read: Tensor | None,
        seeds: tuple[Tensor | None, ...],
        relative: Relative,
    ) -> tuple[Tensor, Tensor]:
        heads = self.attention["self"](x, cu_seqlens, max_seqlen, seeds[0], relative)
        if read is not None:
            heads, residual = inputs.take_rows(heads, read), inputs.take_rows(residual, read)
        return self.behind_heads(heads, residual, seeds)


class XLNetEmbeddings(nn.Module):
    """Word embeddings, at queries `mask_emb`, then dropout. ids [T] -> [T, H]."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.word_embeddings = WordEmbedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, key_ranks: Tensor | None, seed: Tensor | None) -> Tensor:
        x = self.word_embeddings(ids)
        if key_ranks is not None:
            x = torch.where((key_ranks == UNSEEN).unsqueeze(1), self.mask_emb.view(1, -1).to(x.dtype), x)
        return self.dropout(x, seed)


class XLNetModel(Encoder):
    """The XLNet encoder.

    Args:
        config: the configuration.
        add_pooling_layer: whether there is a pooler, a dense layer and a tanh over each sequence's last token. A
            folder has one with a classifier alone, where it is the summary.
    """

    config_class, names = XLNetConfig, parameter_names.XLNET

    def __init__(self, config: XLNetConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.embeddings = XLNetEmbeddings(config)
        layers = nn.ModuleList(XLNetLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)})
        self.pooler = pooler if add_pooling_layer else None
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = module.own_parameters() if isinstance(module, RelativeAttention) else []
        for param in [module.mask_emb] if isinstance(module, XLNetEmbeddings) else own:
            nn.init.normal_(param, std=self.config.initializer_range)

    def embed(
        self, words: Tensor, *ids: Tensor | None, seed: Tensor | None, query_ranks: Tensor | None,
        key_ranks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return self.embeddings(words, key_ranks, seed)

    def beside(
        self, packing: inputs.Packing, words: Tensor, token_types: Tensor | None, positions: Tensor,
        query_ranks: Tensor | None, key_ranks: Tensor | None,
    ) -> tuple[Relative]:  # fmt: skip
        ranks = None if query_ranks is None else (query_ranks, key_ranks)
        dtype = wide(self.embeddings.mask_emb).dtype
        inputs.check_places(positions, packing.max_seqlen)
        end = packing.max_seqlen + -packing.max_seqlen % ROUNDED_TO
        return (Relative.of(positions, token_types, ranks, end, self.config.hidden_size, dtype),)

    def layers(self) -> nn.ModuleList:
        return self.encoder["layer"]

    def pooled_places(self, packing: inputs.Packing) -> Tensor:
        return packing.last_places()

    def pool(self, last: Tensor) -> Tensor:
        return self.pooler["dense"](last)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        ranks: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
    ) -> EncoderOutput:
        """As `Encoder.forward`; a batch may have an order, and queries in it.

        Args:
            token_type_ids: the tokens' segments, 0 to 7.
            position_ids: places below `max_seqlen`, of which differences count; a query has that of the word that it
                predicts.
            perm_mask: [B, S, S] of a padded batch as `transformers` takes it: not 0 where the token of the second axis
                does not see that of the third. A token sees itself nonetheless, a query does not.
            target_mapping: [B, P, S] of 0 and 1, a row for each query with a 1 at its place; a row of zeros is a query
                that sees nothing. The output is then the queries' alone, [B, P, H].
            ranks: (query_ranks, key_ranks), int32 and like `input_ids`: within a sequence a token sees those whose key
                rank is at most its own query rank. A token whose key rank is `UNSEEN` (2**31 - 1) is a query: its input
                is `mask_emb`, whatever its id. None: all see all.
            The others are those of `Encoder.forward`.

        Returns:
            EncoderOutput; `sequence_output` is [B, P, H] with `target_mapping`.

        Raises:
            ValueError, TypeError: as `Encoder.forward`; masks that do not fit, or what they say cannot be an order:
                of two tokens, or queries, of a sequence one must see all that the other sees.
        """
        if perm_mask is None and target_mapping is None:
            query_ranks, key_ranks = (None, None) if ranks is None else ranks
            return self.encode(
                input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, masked_positions,
                query_ranks=query_ranks, key_ranks=key_ranks,
            )  # fmt: skip
        _refuse_beside_masks(ranks, position_ids, cu_seqlens, masked_positions)
        streams = TwoStreams.of(input_ids, attention_mask, token_type_ids, perm_mask, target_mapping)
        out = self.encode(
            streams.input_ids, streams.attention_mask, streams.token_type_ids, streams.position_ids, None, None,
            streams.places, query_ranks=streams.query_ranks, key_ranks=streams.key_ranks,
        )  # fmt: skip
        return out._replace(sequence_output=streams.by_sequence(out.sequence_output))


class XLNetLMHeadModel(PreTrainingModel):
    """XLNet and its head: words, by a decoder that is tied to the word embedding."""

    fills_gaps = False
    encoder_class, sentence_label = XLNetModel, None
    config_class, names = XLNetConfig, parameter_names.XLNET

    def __init__(self, config: XLNetConfig):
        super().__init__(config)
        self.lm_loss = Decoder(config)

    @property
    def predictions(self) -> Decoder:
        return self.lm_loss

    def word_logits(self, ids: Tensor, place: int, mask_id: int, **types: Tensor) -> Tensor:
        """As `PreTrainingModel.word_logits`, by a query there, all other tokens being seen."""
        one = torch.zeros(1, 1, len(ids), device=ids.device)
        one[..., place] = 1.0
        types = {name: x.unsqueeze(0) for name, x in types.items()}
        return self(ids.unsqueeze(0), perm_mask=one.expand(1, len(ids), -1), target_mapping=one, **types).logits[0, 0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        ranks: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Encodes as `XLNetModel.forward` does, and predicts words at the labelled positions only.

        With `target_mapping` labels are int64 [B, P], one of each query, and logits [B, P, V], as in `transformers`.
        Packed, the queries are tokens of the batch, and `masked_positions` [M] names them; labels are [M].

        Returns:
            MaskedLMOutput.

        Raises:
            ValueError, TypeError: as `XLNetModel.forward`; and labels or positions of the wrong shape, dtype or range.
        """
        if perm_mask is None and target_mapping is None:
            out = self.predict(
                input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, labels, None,
                masked_positions, ranks=ranks,
            )  # fmt: skip
            return MaskedLMOutput(out.mlm_loss, out.prediction_logits, out.hits)
        _refuse_beside_masks(ranks, position_ids, cu_seqlens, masked_positions)
        streams = TwoStreams.of(input_ids, attention_mask, token_type_ids, perm_mask, target_mapping)
        if labels is not None and streams.places is not None:
            labels = labels.flatten()
        out = self.predict(
            streams.input_ids, streams.attention_mask, streams.token_type_ids, streams.position_ids, None, None, labels,
            None, streams.places, ranks=(streams.query_ranks, streams.key_ranks),
        )  # fmt: skip
        return MaskedLMOutput(out.mlm_loss, streams.by_sequence(out.prediction_logits), out.hits)


def _refuse_beside_masks(*others: Any) -> None:
    if any(x is not None for x in others):
        raise ValueError(
            "perm_mask and target_mapping are of padded batches, and neither ranks, position_ids, cu_seqlens nor "
            "masked_positions go with them: give ranks in their place"
        )
