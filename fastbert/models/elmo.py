"""ELMo: a forward and a backward LSTM language model over the same word embeddings, whose layers are the features.

    x_0 = embedding(w)                    x_l = LSTM_l(x_{l-1}), from the second layer on + x_{l-1}
    forward:  p(w_t | w_1 .. w_{t-1}) = softmax(x_L[t-1] W^T + b)        of LSTMs that read from the left
    backward: p(w_t | w_{t+1} .. w_T) = softmax(x_L[t+1] W^T + b)        of others that read from the right

Word embeddings and the softmax's W and b are shared by the directions, their LSTMs are not. A layer's features are
both directions' outputs side by side, [T, 2 W]; layer 0 is the embedding twice. Each sequence begins with [CLS] and
ends with [SEP], the context of its first and its last word. Unlike the published model this one does not
clip the cells' state.

Source: Peters, Neumann, Iyyer, Gardner, Clark, Lee and Zettlemoyer, "Deep contextualized word representations" (2018).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastbert.models import inputs
from fastbert.models.layers import Dropout
from fastbert.models.own_folder import OwnFolder
from fastbert.models.parameter_names import Names
from fastbert.models.recurrent import Rectangles
from fastbert.models.sampled_softmax import LogUniform, sampled_softmax_loss
from fastbert.ops.cross_entropy import cross_entropy_with_hits
from fastbert.ops.linear import linear
from fastbert.ops.philox import draw_seeds

NAMES = Names("elmo", "elmo", "Elmo", "an ELMo", "softmax.", ("softmax.",))


@dataclasses.dataclass(frozen=True)
class ElmoConfig:
    """Sizes of an ELMo; presets "tiny", "mini", "small", "base" and "large", the last being the published one's LSTMs.

    Attributes:
        vocab_size: rows of the word embeddings and of the softmax.
        cell_size: an LSTM's cells, of one direction.
        projection_size: an LSTM's output within its recurrence (torch's `proj_size`); None for the cells themselves. It
            saves weights, and on a CPU time from some thousand cells on: torch has no oneDNN for it.
        num_hidden_layers: LSTMs of each direction, one on the other.
        max_length: tokens of the longest sequence that it is given; it has no table that would run out.
        pad_token_id: the id of the padding; None for none.
        dropout: probability, on the embeddings and behind each LSTM.

    Raises:
        ValueError: a size below 1, a padding that is no id, or no probability.
    """

    vocab_size: int = 30522
    cell_size: int = 4096
    projection_size: int | None = 512
    num_hidden_layers: int = 2
    max_length: int = 512
    pad_token_id: int | None = 0
    dropout: float = 0.1

    presets: ClassVar[dict[str, dict[str, int | None]]] = {
        "tiny": {"cell_size": 128, "projection_size": None},
        "mini": {"cell_size": 256, "projection_size": None},
        "small": {"cell_size": 512, "projection_size": None},
        "base": {"cell_size": 2048, "projection_size": 256},
        "large": {"cell_size": 4096, "projection_size": 512},
    }
    # What an encoder's configuration has, for those who read either.
    type_vocab_size: ClassVar[int] = 1
    padding_side: ClassVar[str] = "right"
    first_position: ClassVar[int] = 0
    is_decoder: ClassVar[bool] = True
    norm: ClassVar[str] = "layer"
    attention_kind: ClassVar[str] = "soft"  # it has none
    attention_window: ClassVar[None] = None

    def __post_init__(self):
        sizes = ["vocab_size", "cell_size", "num_hidden_layers", "max_length"]
        for name in [*sizes, *["projection_size"] * (self.projection_size is not None)]:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.projection_size is not None and self.projection_size >= self.cell_size:
            raise ValueError(
                f"projection_size must be below cell_size = {self.cell_size}, or None, got {self.projection_size}"
            )
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id must be None or an id in the vocabulary of {self.vocab_size}, got {pad!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability from 0 to below 1, got {self.dropout!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration that `presets` has under this name, with any field given by name instead.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in cls.presets:
            raise ValueError(f"no ELMo preset is called {name!r}: expected one of {', '.join(cls.presets)}")
        return cls(**(cls.presets[name] | overrides))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration in a config.json's fields, of which others are left out; raises as the class does."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})

    @property
    def width(self) -> int:
        """W: of the word embeddings and of each direction's outputs."""
        return self.cell_size if self.projection_size is None else self.projection_size

    @property
    def hidden_size(self) -> int:
        """Numbers of a token's features: both directions'."""
        return 2 * self.width

    @property
    def longest(self) -> int:
        return self.max_length

    @property
    def max_position_embeddings(self) -> int:
        return self.max_length


class ElmoOutput(NamedTuple):
    """What `ElmoModel` returns.

    Attributes:
        sequence_output: the last layer's features, [B, S, 2 W], zeros at padding, or packed [T, 2 W].
        hidden_states: those of every layer from the embeddings on, as many as LSTMs and one.
    """

    sequence_output: Tensor
    hidden_states: tuple[Tensor, ...]

    @property
    def last_hidden_state(self) -> Tensor:
        return self.sequence_output


class ElmoModel(OwnFolder):
    """The LSTMs of both directions over word embeddings, see the module."""

    config_class, model_type, names = ElmoConfig, "fastbert-elmo", NAMES
    checkpoint_layers = False

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        # Said once a process for every LSTM with projections: `ElmoConfig` says it.
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN", UserWarning)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_token_id)
        self.forth, self.back = (
            nn.ModuleList(
                nn.LSTM(config.width, config.cell_size, batch_first=True, proj_size=config.projection_size or 0)
                for _ in range(config.num_hidden_layers)
            )
            for _ in range(2)
        )
        self.dropout = Dropout(config.dropout)
        with torch.no_grad():
            self.word_embeddings.weight.normal_(std=0.1)
            if config.pad_token_id is not None:
                self.word_embeddings.weight[config.pad_token_id] = 0.0
            for lstm in (*self.forth, *self.back):  # cells that keep what they have, at first
                lstm.bias_hh_l0.zero_()
                lstm.bias_ih_l0.zero_()[config.cell_size : 2 * config.cell_size] = 1.0

    @classmethod
    def own_tensors(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a model with its softmax the LSTMs and embeddings."""
        inner = {name.removeprefix("elmo."): x for name, x in tensors.items() if name.startswith("elmo.")}
        return inner or tensors

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        masked_positions: Tensor | None = None,
    ) -> tuple[inputs.Packing, list[tuple[Tensor, Tensor]]]:
        """As `forward`: how the tokens are packed, and of each layer both directions' outputs, [T, W] each."""
        packing, _ = inputs.pack(
            self.config, input_ids, attention_mask, None, None, cu_seqlens, max_seqlen, masked_positions
        )
        ids = packing.remove_padding(input_ids)
        first, *seeds = self._draw_seeds(input_ids.device)
        x = self.dropout(self.word_embeddings(ids), first)
        layers = [(x, x)]
        if not len(ids):
            return packing, layers * (1 + self.config.num_hidden_layers)
        layout = Rectangles.of(packing.cu_seqlens, len(ids), packing.max_seqlen)
        for number, pair in enumerate(zip(self.forth, self.back, strict=True)):
            made = []
            for direction, lstm in enumerate(pair):
                below = layers[-1][direction]
                out = self.dropout(layout.through(lstm, below, direction), seeds[2 * number + direction])
                made.append(out + below if number else out)
            layers.append(tuple(made))
        return packing, layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> ElmoOutput:
        """The features of every token.

        Args:
            token_type_ids, position_ids: not looked at.
            The others are those of `Encoder.forward`.

        Returns:
            ElmoOutput.

        Raises:
            ValueError, TypeError: as `Encoder.forward`.
        """
        packing, layers = self.encode(input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        states = tuple(packing.put_padding_back(torch.cat(pair, 1)) for pair in layers)
        return ElmoOutput(states[-1], states)

    def _draw_seeds(self, device: torch.device) -> list[Tensor | None]:
        """The embeddings' of dropout, then each layer's, of either direction."""
        p = self.config.dropout if self.training else 0.0
        return draw_seeds([p] * (1 + 2 * self.config.num_hidden_layers), device)

    def skip_seeds(self, device: torch.device) -> None:
        """Draws from torch's generator what a forward pass would, so that another process may compute it."""
        self._draw_seeds(device)


class ElmoForPreTrainingOutput(NamedTuple):
    """What `ElmoForPreTraining` returns.

    Attributes:
        loss: float32 scalar, the mean of both directions' losses; None without labels.
        directions: float32 [2], the forward and the backward model's mean over labels that are not ignored; None
            without labels. Their exponentials are the perplexities.
        prediction_logits: forward and backward, [2, M, V]; without labels [2, B, S, V] or [2, T, V], at each token the
            words behind it and before it; None in training with labels, which needs the losses alone.
        hits: one float32 [2]: how many predictions of both directions are right, and how many there are; empty without
            labels and of a sampled softmax.
    """

    loss: Tensor | None
    directions: Tensor | None
    prediction_logits: Tensor | None
    hits: tuple[Tensor, ...] = ()

    @property
    def mlm_loss(self) -> Tensor | None:
        """The loss by the name that every model has for it; and so below."""
        return self.loss

    @property
    def sentence_loss(self) -> None:
        return None

    @property
    def sentence_logits(self) -> None:
        return None


class Softmax(nn.Module):
    """The words' output vectors and biases, which both directions share: hidden [M, W] -> logits [M, V]."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.vocab_size, config.width) / config.width**0.5)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)


class ElmoForPreTraining(OwnFolder):
    """ELMo with the softmax that its two language models share.

    Attributes:
        sampling: None, or the words that training draws in place of the whole softmax; evaluation takes the whole.
    """

    config_class, model_type, names = ElmoConfig, "fastbert-elmo", NAMES
    sentence_label: ClassVar[None] = None
    sampling: LogUniform | None = None

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        self.elmo, self.softmax = ElmoModel(config), Softmax(config)

    @property
    def base_model(self) -> ElmoModel:
        return self.elmo

    @property
    def word_embeddings(self) -> nn.Parameter:
        """The table that the input is looked up in, a row per word; it decodes nothing."""
        return self.elmo.word_embeddings.weight

    @property
    def predictions(self) -> Softmax:
        return self.softmax

    def skip_seeds(self, passes: int, device: torch.device | str) -> None:
        """Draws from torch's generator what so many forward passes would, so that others may compute them elsewhere."""
        for _ in range(passes):
            self.elmo.skip_seeds(torch.device(device))

    def word_logits(self, ids: Tensor, place: int, mask_id: int, **types: Tensor) -> Tensor:
        """As `PreTrainingModel.word_logits`: the sum of what both directions say, neither of which sees the word."""
        ids = ids.index_fill(0, torch.tensor([place], device=ids.device), mask_id)
        logits = self(ids.unsqueeze(0), **{name: x.unsqueeze(0) for name, x in types.items()}).prediction_logits
        return logits[0, 0, place - 1] + logits[1, 0, place + 1]

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
    ) -> ElmoForPreTrainingOutput:
        """Predicts words from both sides.

        Args:
            labels: int64 [M] with `masked_positions`, the words to predict or -100; a word's forward context ends at
                its place in `masked_positions`, the token before it, and its backward context two tokens later.
            masked_positions: int64 [M], as of `BertForPreTraining.forward`; needed with labels.
            The others are those of `ElmoModel.forward`.

        Returns:
            ElmoForPreTrainingOutput.

        Raises:
            ValueError, TypeError: as `ElmoModel.forward`; labels without places, or of the wrong shape, dtype or range.
        """
        if (labels is None) != (masked_positions is None):
            raise ValueError("labels and masked_positions belong together: give both, or neither")
        inputs.check_targets(self.config, input_ids, cu_seqlens, labels, {}, masked_positions)
        packing, layers = self.elmo.encode(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, masked_positions
        )
        if labels is None:
            logits = [packing.put_padding_back(self.softmax(x)) for x in layers[-1]]
            return ElmoForPreTrainingOutput(None, None, torch.stack(logits))
        before = packing.packed_places(masked_positions)
        places = before, before + 2
        hidden = [inputs.take_rows(x, inputs.within(at, len(x))) for x, at in zip(layers[-1], places, strict=True)]
        if self.training and self.sampling is not None:
            directions = sampled_softmax_loss(hidden, labels, self.softmax.weight, self.softmax.bias, self.sampling)
            return ElmoForPreTrainingOutput(directions.mean(), directions, None)
        logits = [self.softmax(x) for x in hidden]
        losses, hits = zip(*(cross_entropy_with_hits(x, labels, inputs.IGNORED) for x in logits), strict=True)
        directions = torch.stack(losses)
        kept = torch.stack(logits) if not self.training else None
        return ElmoForPreTrainingOutput(directions.mean(), directions, kept, (hits[0] + hits[1],))
