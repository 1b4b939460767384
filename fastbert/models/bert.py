"""BERT: configuration, encoder and pretraining heads. Wiring only; what computes is in `nn` and the ops under it.

Modules and parameters carry the names that Hugging Face gives them, except that query, key and value are one matrix
(`attention.self.qkv`). Inside, tokens are packed: padding is removed once before the first layer and put back once
after the last. Source: Devlin, Chang, Lee and Toutanova, "BERT" (2019).
"""

import dataclasses
import os
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastbert.models import checkpoint, inputs
from fastbert.models.layers import Dropout, DropoutAddLayerNorm, LayerNorm, Linear, LinearGELU, MultiHeadAttention
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.linear import linear

_PRESETS = {  # layers, hidden size, heads; the intermediate size is four times the hidden size
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
_GELU = {  # hidden_act -> approximate; transformers has several names, and ways to compute it, for each of the two
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and probabilities of a BERT; names and defaults (BERT base) are Hugging Face's.

    `hidden_act` is "gelu" or "gelu_python" (erf), or one of "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh",
    "gelu_fast" and "gelu_accurate" (tanh). `pad_token_id` is the row of the word
    embeddings that starts as zeros and gets no gradient from the input; None for no such row.

    Raises:
        ValueError: a value that no BERT can have.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BertConfig":
        """The configuration called "tiny", "mini", "small", "base" or "large", with any field given by name instead.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"no BERT preset is called {name!r}: expected one of {', '.join(_PRESETS)}")
        layers, hidden, heads = _PRESETS[name]
        fields = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return cls(**(fields | {"intermediate_size": 4 * hidden} | overrides))

    def __post_init__(self):
        for name in (f.name for f in dataclasses.fields(self) if f.type is int):
            value = getattr(self, name)
            if not _is_number(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not _is_number(value, float) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability: expected a number from 0 to 1, got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value, float) or not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number, finite and not negative, got {value!r}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in _GELU:
            raise ValueError(f"hidden_act must be one of {', '.join(_GELU)}, got {self.hidden_act!r}")
        pad = self.pad_token_id
        if pad is not None and not (_is_number(pad, int) and 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id must be None or an id in the vocabulary of {self.vocab_size}, got {pad!r}")

    @property
    def approximate(self) -> str:
        """GELU's form, as `fastbert.gelu` says it."""
        return _GELU[self.hidden_act]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)


class BertModelOutput(NamedTuple):
    """What `BertModel` returns; also readable under Hugging Face's names.

    Attributes:
        sequence_output: [B, S, H], zeros at padding, or packed [T, H]; [M, H] where `masked_positions` were given.
        pooled_output: [B, H], tanh of a dense layer over each sequence's first token.
    """

    sequence_output: Tensor
    pooled_output: Tensor

    @property
    def last_hidden_state(self) -> Tensor:
        return self.sequence_output

    @property
    def pooler_output(self) -> Tensor:
        return self.pooled_output


class BertForPreTrainingOutput(NamedTuple):
    """What `BertForPreTraining` returns; a loss is None where its labels were not given.

    Attributes:
        loss: float32 scalar, the sum of the two below.
        mlm_loss: float32 scalar, the mean over labels that are not ignored; 0 where there are none.
        nsp_loss: float32 scalar, likewise over sequences.
        prediction_logits: [M, V] at the labelled positions in order; without labels at all: [B, S, V] or [T, V].
        seq_relationship_logits: [B, 2].
    """

    loss: Tensor | None
    mlm_loss: Tensor | None
    nsp_loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor


class BertEmbeddings(nn.Module):
    """Word, position and token type embeddings: sum, LayerNorm, then dropout. All ids [T] -> [T, H]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = LayerNorm(hidden, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        types = self.token_type_embeddings
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        x = x + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        return self.dropout(self.LayerNorm(x))


class BertOutput(nn.Module):
    """How both halves of a layer end: dense, dropout, residual, LayerNorm. x [T, F], residual [T, H] -> [T, H]."""

    def __init__(self, size: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(size, config.hidden_size)
        self.LayerNorm = DropoutAddLayerNorm(config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x), residual)


class BertLayer(nn.Module):
    """Attention, then the feed-forward network. x [T, H] -> [T, H], or [R, H] for the places `read` alone."""

    def __init__(self, config: BertConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = MultiHeadAttention(hidden, config.num_attention_heads, config.attention_probs_dropout_prob)
        self.attention = nn.ModuleDict({"self": heads, "output": BertOutput(hidden, config)})
        self.intermediate = nn.ModuleDict({"dense": LinearGELU(hidden, inner, config.approximate)})
        self.output = BertOutput(inner, config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, read: Tensor | None = None) -> Tensor:
        heads = self.attention["self"](x, cu_seqlens, max_seqlen)
        if read is not None:
            heads, x = inputs.take_rows(heads, read), inputs.take_rows(x, read)
        x = self.attention["output"](heads, x)
        return self.output(self.intermediate["dense"](x), x)


Model = TypeVar("Model", bound="BertPreTrainedModel")


class BertPreTrainedModel(nn.Module):
    """What both models share: initialisation, and Hugging Face's folders."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | LinearGELU | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear | LinearGELU):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0.0

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike) -> Model:
        """The model in a Hugging Face folder, in float32 and evaluation mode; see `checkpoint.load`."""
        fields, tensors = checkpoint.load(folder)
        known = {f.name for f in dataclasses.fields(BertConfig)}
        model = cls(BertConfig(**{name: value for name, value in fields.items() if name in known}))
        checkpoint.assign(model, tensors, folder)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, tokenizer: Any = None) -> None:
        """Writes a folder that `transformers` and `from_pretrained` load; see `checkpoint.save`."""
        checkpoint.save(self, folder, dataclasses.asdict(self.config), tokenizer)


class BertModel(BertPreTrainedModel):
    """The BERT encoder with its pooler.

    Weights start as N(0, initializer_range), biases as 0, LayerNorm as 1 and 0, the padding token's embedding as 0.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)})
        self.apply(self._init_weights)

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
    ) -> BertModelOutput:
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
            BertModelOutput. An empty sequence pools a zero vector in place of its first token.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, a sequence longer than the position table, and, on
                a CPU outside torch.compile, ids or places out of range or boundaries that do not hold.
            RuntimeError: within `torch.jit.trace`.
        """
        packing, position_ids = inputs.pack(
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            masked_positions,
        )
        ids = (packing.remove_padding(x) for x in (input_ids, token_type_ids, position_ids))
        x = self.embeddings(*ids)  # [T, H]
        *earlier, last = self.encoder["layer"]
        for layer in earlier:
            x = layer(x, packing.cu_seqlens, packing.max_seqlen)
        first = packing.first_places()
        if masked_positions is None:
            x = last(x, packing.cu_seqlens, packing.max_seqlen)
            sequence_output, first = packing.put_padding_back(x), inputs.take_rows(x, first)
        else:
            read = torch.cat([first, packing.packed_places(masked_positions)])
            x = last(x, packing.cu_seqlens, packing.max_seqlen, read)
            first, sequence_output = x[: len(first)], x[len(first) :]
        pooled_output = torch.tanh(self.pooler["dense"](packing.without_empty(first)))
        return BertModelOutput(sequence_output, pooled_output)


class BertPredictions(nn.Module):
    """The masked word head: dense, GELU, LayerNorm, then the word embedding as decoder. hidden [M, H] -> [M, V]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        dense = LinearGELU(config.hidden_size, config.hidden_size, config.approximate)
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        hidden = self.transform["LayerNorm"](self.transform["dense"](hidden))
        return linear(hidden, word_embeddings, self.bias)


class BertForPreTraining(BertPreTrainedModel):
    """BERT with its two pretraining heads: masked words (decoder tied to the word embedding) and next sentence."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        heads = {"predictions": BertPredictions(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        self.cls = nn.ModuleDict(heads)
        self.cls.apply(self._init_weights)

    @property
    def word_embeddings(self) -> nn.Parameter:
        """[V, H], the table that the input is looked up in and that decodes predictions."""
        return self.bert.embeddings.word_embeddings.weight

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
        inputs.check_targets(self.config, input_ids, cu_seqlens, labels, next_sentence_label, masked_positions)
        if labels is not None and masked_positions is None:
            masked_positions = (labels.flatten() != inputs.IGNORED).nonzero().squeeze(1)
            labels = labels.flatten().index_select(0, masked_positions)
        hidden, pooled = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            masked_positions=masked_positions,
        )
        if labels is not None and attention_mask is not None:
            padding = attention_mask.flatten().index_select(0, masked_positions) == 0
            labels = labels.masked_fill(padding, inputs.IGNORED)

        logits = self.cls["predictions"](hidden.flatten(0, -2), self.word_embeddings)
        logits = logits.view(*hidden.shape[:-1], logits.shape[1])
        seq_relationship_logits = self.cls["seq_relationship"](pooled)

        mlm_loss = None if labels is None else cross_entropy(logits, labels, inputs.IGNORED)
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = cross_entropy(seq_relationship_logits, next_sentence_label, inputs.IGNORED)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        return BertForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            mlm_loss=mlm_loss,
            nsp_loss=nsp_loss,
            prediction_logits=logits,
            seq_relationship_logits=seq_relationship_logits,
        )
