"""What the models share: embeddings, the layer, the way of a batch through the encoder, folders of Hugging Face.

Inside, tokens are packed: padding is removed once before the first layer and put back once after the last. What
computes is in `layers` and the ops under it. Source: Devlin, Chang, Lee and Toutanova, "BERT" (2019).
"""

import contextvars
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastbert.models import checkpoint, inputs
from fastbert.models.config import REACHES_OTHERS, WITH_RUNNING, ModelConfig
from fastbert.models.layers import (
    DenseAddLayerNorm,
    Dropout,
    LayerNorm,
    LinearGELU,
    MultiHeadAttention,
    SmallEmbedding,
    WordEmbedding,
    embed,
)
from fastbert.models.norms import DenseAddNorm, Tokens
from fastbert.models.parameter_names import Names
from fastbert.ops.philox import draw_seeds


class EncoderOutput(NamedTuple):
    """What an encoder returns; also readable under Hugging Face's names.

    Attributes:
        sequence_output: [B, S, H], zeros at padding, or packed [T, H]; [M, H] where `masked_positions` were given.
        pooled_output: [B, H], tanh of a dense layer over each sequence's first token; None without a pooler.
    """

    sequence_output: Tensor
    pooled_output: Tensor | None

    @property
    def last_hidden_state(self) -> Tensor:
        return self.sequence_output

    @property
    def pooler_output(self) -> Tensor | None:
        return self.pooled_output


class Embeddings(nn.Module):
    """Word, position and token type embeddings: sum, LayerNorm, then dropout. All ids [T] -> [T, size]."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.word_embeddings = WordEmbedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        unused = config.first_position - 1 if config.first_position else None
        self.position_embeddings = SmallEmbedding(config.max_position_embeddings, size, padding_idx=unused)
        self.token_type_embeddings = SmallEmbedding(config.type_vocab_size, size)
        self.LayerNorm = LayerNorm(size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, *ids: Tensor | None, seed: Tensor | None = None, **more: Tensor | None) -> Tensor:
        """Of the ids that `rows` takes; `seed` is dropout's."""
        return embed(self.rows(*ids, **more), self.LayerNorm, self.dropout, seed)

    def rows(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor
    ) -> list[tuple[nn.Embedding, Tensor | None]]:
        """The tables whose rows are added up, and their ids; None for the first row alone."""
        return [
            (self.word_embeddings, input_ids), (self.position_embeddings, position_ids),
            (self.token_type_embeddings, token_type_ids),
        ]  # fmt: skip


# Of dropout in a layer: on attention's weights, behind attention, behind the feed-forward network.
Seeds = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layer(nn.Module):
    """Attention, then the feed-forward network. x [T, H] -> [T, H], or [R, H] for the places `read` alone.

    Both come twice, as two tensors of the same numbers: what is computed with, and what is added behind it. Their
    gradients are then added where a LayerNorm made them, see `dropout_add_layer_norm_twice`.

    Its parameters have the names of Hugging Face's BERT, except that query, key and value are one matrix,
    `attention.self.qkv`.

    Args:
        config: the model's.
        heads: what is called as `MultiHeadAttention`, in place of the one that the configuration describes.
        bias: whether the product behind the heads has one.
    """

    def __init__(self, config: ModelConfig, heads: nn.Module | None = None, bias: bool = True):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = _heads(config) if heads is None else heads
        self.attention = nn.ModuleDict({"self": heads, "output": _end(hidden, config, bias)})
        self.intermediate = nn.ModuleDict({"dense": LinearGELU(hidden, inner, config.approximate)})
        self.output = _end(inner, config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        read: Tensor | None = None,
        seeds: Seeds = (None, None, None),
        *tokens: Tokens,
    ) -> tuple[Tensor, Tensor]:
        """`tokens` are what `Encoder.beside` gives."""
        attention, given = self.attention["self"], (x, cu_seqlens, max_seqlen, seeds[0])
        if read is None or tokens:
            heads = attention(*given)
        else:
            heads = attention(*given, read) if x.shape[0] else inputs.take_rows(attention(*given), read)
            residual = inputs.take_rows(residual, read)
        x, residual = self.behind_heads(heads, residual, seeds, *tokens)
        if read is not None and tokens:  # statistics were of all
            x = residual = inputs.take_rows(x, read)
        return x, residual

    def behind_heads(self, heads: Tensor, residual: Tensor, seeds: Seeds, *tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What is computed of the heads' outputs, [T, H], and the residual's same rows; the others are of `forward`."""
        x, residual = self.attention["output"](heads, residual, seeds[1], *tokens)
        return self.output(self.intermediate["dense"](x), residual, seeds[2], *tokens)


def _heads(config: ModelConfig) -> MultiHeadAttention:
    window = None if config.attention_window is None else (config.attention_window // 2,) * 2
    return MultiHeadAttention(
        config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob, config.is_decoder,
        window=window, global_first=config.attention_global_first, attention_kind=config.attention_kind,
        temperature=config.attention_temperature,
    )  # fmt: skip


def _end(in_features: int, config: ModelConfig, bias: bool = True) -> DenseAddLayerNorm | DenseAddNorm:
    if config.norm != "layer":
        return DenseAddNorm(in_features, config)
    return DenseAddLayerNorm(in_features, config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob, bias)


class PreTrainedModel(nn.Module):
    """What all models have: a configuration, initialisation, and Hugging Face's folders."""

    config_class: ClassVar[type[ModelConfig]]
    names: ClassVar[Names]
    causal_name: ClassVar[str | None] = None  # the class of transformers for a folder that says is_decoder

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | LinearGELU | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear | LinearGELU) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0.0

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> Self:
        """The model in a Hugging Face folder, in float32 and evaluation mode; see `checkpoint.load`.

        `options` are the class's own, beside the configuration, such as an encoder's `add_pooling_layer`.
        """
        fields, tensors = checkpoint.load(folder, cls.names)
        model = cls(cls.config_class.from_fields(fields), **cls.stored_options(fields), **options)
        checkpoint.assign(model, tensors, folder)
        return model.eval()

    @classmethod
    def stored_options(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What the constructor takes beside the configuration and config.json's fields say."""
        return {}

    def fields(self) -> dict[str, Any]:
        """What config.json says of the model."""
        return self.config.to_fields()

    @property
    def loaded_by(self) -> str:
        """Who loads its folder, as a sentence."""
        if self.config.foreign is None:
            name = self.causal_name if self.config.is_decoder and self.causal_name else type(self).__name__
            return f"transformers.{name}.from_pretrained loads it"
        return f"fastbert loads it; transformers cannot, as it has no {self.config.foreign}"

    def save_pretrained(self, folder: str | os.PathLike, tokenizer: Any = None) -> None:
        """Writes a folder that `from_pretrained` loads, and `transformers` too unless `config.foreign`.

        See `checkpoint.save`.
        """
        checkpoint.save(self, folder, self.fields(), tokenizer)


class ModelWithHead(PreTrainedModel):
    """An encoder, under the name that it has in Hugging Face's models (`bert`, `albert`, ...), and what is on top.

    Args:
        config: the configuration.
        options: the encoder's own.
    """

    encoder_class: ClassVar[type["Encoder"]]

    def __init__(self, config: ModelConfig, **options: Any):
        super().__init__(config)
        self.add_module(self.names.encoder, self.encoder_class(config, **options))

    @property
    def base_model(self) -> "Encoder":
        return getattr(self, self.names.encoder)


class Encoder(PreTrainedModel):
    """An encoder with its pooler, or without (`pooler` is None then); a subclass has `embed`, `layers` and `pool`.

    Weights start as N(0, initializer_range), biases as 0, LayerNorm as 1 and 0, the padding token's embedding as 0.

    Attributes:
        checkpoint_layers: in training keep the input of each layer alone for the backward pass, which computes the
            layer again: less memory, a third more time, the same bits. False at first.
    """

    checkpoint_layers = False
    pooler: nn.Module | None

    def embed(self, *ids: Tensor | None, seed: Tensor | None, **more: Tensor | None) -> Tensor:
        """`ids` of words, token types and positions, [T] -> [T, H].

        `seed` is dropout's, and `more` are the ids that `encode` was given besides.
        """
        raise NotImplementedError

    def layers(self) -> Sequence[Callable[..., tuple[Tensor, Tensor]]]:
        """What is called one after another, with the arguments of `Layer.forward`."""
        raise NotImplementedError

    def beside(
        self, packing: inputs.Packing, words: Tensor, token_types: Tensor | None, positions: Tensor,
        **more: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """What every layer is told of a batch besides: its ids and their kinds where a norm reaches other tokens."""
        if self.config.norm not in REACHES_OTHERS:
            return ()
        return (Tokens.of(words, packing.cu_seqlens, self.config.pad_token_id),)

    def pooled_places(self, packing: inputs.Packing) -> Tensor:
        """int64 [B]: the packed token that each sequence is pooled by, any of an empty one; `pool` gets their rows."""
        return packing.first_places()

    def pool(self, first: Tensor) -> Tensor:
        """The tokens at `pooled_places`, [B, H] -> [B, H], before the tanh."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
    ) -> EncoderOutput:
        """Encodes a padded batch, or a packed one where `cu_seqlens` is given.

        Args:
            input_ids: int64 or int32 [B, S], or packed [T].
            attention_mask: bool or integer [B, S], 0 at padding, which may stand anywhere; None for no padding. Looked
                at once, so on a GPU it waits for the device. Not with `cu_seqlens`.
            token_type_ids: like `input_ids`; None is all 0.
            position_ids: like `input_ids` (or [1, S]); None counts from 0 in every sequence.
            cu_seqlens: int32 [B + 1], where each packed sequence starts, and T.
            max_seqlen: tokens of the longest packed sequence, or more; None looks at `cu_seqlens`, so on a GPU it
                waits for the device.
            masked_positions: int64 [M], the only places whose output is wanted: places in the packed tokens, or in the
                padded batch read as [B * S] (at padding: any token's output). Behind its attention the last layer is
                then computed at these and at the first tokens alone. None for all.

        Returns:
            EncoderOutput. An empty sequence pools a zero vector in place of its first token.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, a sequence longer than the position table, and, on
                a CPU outside torch.compile, ids or places out of range or boundaries that do not hold.
            RuntimeError: within `torch.jit.trace`.
        """
        return self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, masked_positions
        )

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        masked_positions: Tensor | None,
        **more: Tensor | None,
    ) -> EncoderOutput:
        """What `forward` says of its arguments; `more` are for `embed` and `beside`, each like `input_ids`."""
        packing, position_ids = inputs.pack(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
            masked_positions, more,
        )  # fmt: skip
        words, *ids = (packing.remove_padding(x) for x in (input_ids, token_type_ids, position_ids))
        *earlier, last = self.layers()
        seed, *seeds = self._draw_seeds(len(earlier) + 1, input_ids.device)
        more = {name: packing.remove_padding(x) for name, x in more.items()}
        beside = self.beside(packing, words, *ids, **more)
        x = residual = self.embed(words, *ids, seed=seed, **more)  # [T, H]
        for number, layer in enumerate(earlier):
            x, residual = self._through(layer, x, residual, packing, None, seeds[number], *beside)
        first = self.pooled_places(packing)
        if masked_positions is None:
            x, _ = self._through(last, x, residual, packing, None, seeds[-1], *beside)
            sequence_output, first = packing.put_padding_back(x), inputs.take_rows(x, inputs.within(first, len(x)))
        else:
            read = inputs.within(torch.cat([first, packing.packed_places(masked_positions)]), len(x))
            x, _ = self._through(last, x, residual, packing, read, seeds[-1], *beside)
            first, sequence_output = x.split([len(first), len(masked_positions)])
        if self.pooler is None:
            return EncoderOutput(sequence_output, None)
        return EncoderOutput(sequence_output, torch.tanh(self.pool(packing.without_empty(first))))

    def _draw_seeds(self, layers: int, device: torch.device) -> tuple[Tensor | None, *tuple[Seeds, ...]]:
        """The embeddings' of dropout and each layer's, all at once."""
        hidden, heads = self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob
        if self.config.attention_kind == "gumbel":
            heads = 1.0  # its noise needs the seed
        probabilities = [hidden, *[heads, hidden, hidden] * layers] if self.training else [0.0] * (1 + 3 * layers)
        seed, *seeds = draw_seeds(probabilities, device)
        return seed, *zip(*[iter(seeds)] * 3, strict=True)

    def skip_seeds(self, device: torch.device) -> None:
        """Draws from torch's generator what a forward pass would, so that another process may compute it."""
        self._draw_seeds(len(self.layers()), device)

    def _through(
        self, layer: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, packing: inputs.Packing,
        read: Tensor | None, seeds: Seeds, *beside: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        arguments = x, residual, packing.cu_seqlens, packing.max_seqlen, read, seeds, *beside
        if not (self.checkpoint_layers and self.training and torch.is_grad_enabled()):
            return layer(*arguments)
        if self.config.norm in WITH_RUNNING:
            raise ValueError(
                f"checkpoint_layers computes each layer twice, and norm {self.config.norm!r} would count a batch twice "
                "in its running statistics: train without one of the two"
            )
        if not torch.compiler.is_compiling():  # backward runs outside of the blocks that choose backend and library
            layer = functools.partial(contextvars.copy_context().run, layer)
        # Computed again by the same seeds: the generators, which a captured graph could not set back, are left alone.
        return recomputed(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
