"""What every model's configuration has: sizes and probabilities under Hugging Face's names, checked once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

_GELU = {  # hidden_act -> approximate; transformers has several names, and ways to compute it, for each of the two
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}
AttentionKind = Literal["soft", "hard", "gumbel"]

Norm = Literal["layer", "batch", "instance", "group", "switchable"]
REACHES_OTHERS = "batch", "instance", "switchable"  # norms in which a token's result depends on other tokens
WITH_RUNNING = "batch", "switchable"  # norms that keep running statistics


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and probabilities of an encoder; names and defaults (BERT base) are Hugging Face's.

    `hidden_act` is "gelu" or "gelu_python" (erf), or one of "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh",
    "gelu_fast" and "gelu_accurate" (tanh). `pad_token_id` is the row of the word embeddings that starts as zeros and
    gets no gradient from the input; None for no such row. With `is_decoder` a token sees itself and those before it
    alone, as a language model that predicts the next token.

    What `transformers` has not, so that it cannot load such a model (`foreign`):

    `attention_window`, an even number, lets a token see half as many to each side, as Longformer's field of that name
    says it, and with `attention_global_first` each sequence's first token sees all and all see it (with the same
    projections as the others, unlike Longformer). `attention_kind` is "soft", "hard" (each query takes its best key)
    or "gumbel" (the same, in training with noise); the latter two have a softmax of `attention_temperature` in their
    gradient, see `fastbert.hard_attention`, and no weights to drop.

    `norm` is what normalises behind attention and behind the feed-forward network: "layer", "batch", "instance",
    "group" (of `norm_groups` groups of features) or "switchable", see `norms`. LayerNorm it stays behind the embeddings
    and in the head for masked words.

    Raises:
        ValueError: a value that no such model can have.
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
    is_decoder: bool = False
    attention_window: int | None = None
    attention_global_first: bool = True
    attention_kind: str = "soft"
    attention_temperature: float = 1.0
    norm: Norm = "layer"
    norm_groups: int = 8

    presets: ClassVar[dict[str, dict[str, int]]] = {}  # name -> the fields that differ from the class's defaults
    has_position_table: ClassVar[bool] = True
    padding_side: ClassVar[str] = "right"  # where transformers' tokenizer of the model's folder is to pad

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration in a config.json's fields, of which others are left out; raises as the class does."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration that `presets` has under this name, with any field given by name instead.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in cls.presets:
            model = cls.__name__.removesuffix("Config").upper()
            raise ValueError(f"no {model} preset is called {name!r}: expected one of {', '.join(cls.presets)}")
        return cls(**(cls.presets[name] | overrides))

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
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("dropout_prob")):
            value = getattr(self, name)
            if not _is_number(value, float) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability: expected a number from 0 to 1, got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value, float) or not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number, finite and not negative, got {value!r}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in _GELU:
            raise ValueError(f"hidden_act must be one of {', '.join(_GELU)}, got {self.hidden_act!r}")
        for name in (f.name for f in dataclasses.fields(self) if f.type is bool):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {value!r}")
        self._check_norm()
        pad = self.pad_token_id
        if pad is not None and not (_is_number(pad, int) and 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id must be None or an id in the vocabulary of {self.vocab_size}, got {pad!r}")
        self._check_attention()

    def _check_attention(self) -> None:
        window, temperature = self.attention_window, self.attention_temperature
        if window is not None and not (_is_number(window, int) and window >= 0 and window % 2 == 0):
            raise ValueError(
                f"attention_window must be None or an even int of at least 0, half of it to each side, got {window!r}"
            )
        kinds = get_args(AttentionKind)
        if self.attention_kind not in kinds:
            raise ValueError(f"attention_kind must be one of {', '.join(kinds)}, got {self.attention_kind!r}")
        if not _is_number(temperature, float) or not 0.0 < temperature < float("inf"):
            raise ValueError(f"attention_temperature must be a number above 0 and finite, got {temperature!r}")
        if self.attention_kind != "soft" and self.attention_probs_dropout_prob > 0.0:
            raise ValueError(
                f"attention_kind {self.attention_kind!r} takes one key and has no weights to drop: set "
                f"attention_probs_dropout_prob to 0, got {self.attention_probs_dropout_prob}"
            )

    def to_fields(self) -> dict[str, Any]:
        """For a config.json: all fields, less what `transformers` has not where it is as `transformers` has it."""
        usual = {"attention_window": None, "attention_kind": "soft", "norm": "layer"}
        details = {
            "attention_global_first": "attention_window",
            "attention_temperature": "attention_kind",
            "norm_groups": "norm",
        }
        fields = dataclasses.asdict(self)
        left_out = {name for name, value in usual.items() if fields[name] == value}
        return {name: x for name, x in fields.items() if details.get(name, name) not in left_out}

    @property
    def foreign(self) -> str | None:
        """What `transformers` has not of this model, which it would otherwise load as another; None for nothing."""
        if self.norm != "layer":
            return f"{self.norm} norm"
        if self.attention_kind != "soft":
            return "hard attention"
        return None if self.attention_window is None else "window of attention in this model"

    def _check_norm(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}")
        if self.norm == "group" and self.hidden_size % self.norm_groups:
            raise ValueError(
                "hidden_size must be a multiple of norm_groups, so that every group has as many features; got "
                f"{self.hidden_size} and {self.norm_groups}"
            )
        if self.norm in REACHES_OTHERS:
            if self.is_decoder:
                raise ValueError(
                    f"norm {self.norm!r} takes statistics over tokens, and so tells a token of those behind it: "
                    "expected layer or group where is_decoder is True (objective clm)"
                )
            if self.pad_token_id is None:
                raise ValueError(f"norm {self.norm!r} leaves padding out: pad_token_id must say what that is, got None")

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes; the last row before it is padding's."""
        return 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the position table has rows for."""
        return self.max_position_embeddings - self.first_position

    def attention_columns(self, length: float = math.inf) -> float:
        """Numbers of a token's query (as of its key) as attention takes it, of all heads, in texts of this length."""
        return self.hidden_size

    @property
    def approximate(self) -> str:
        """GELU's form, as `fastbert.gelu` says it."""
        return _GELU[self.hidden_act]


def sizes(layers: int, hidden: int, heads: int, **more: int) -> dict[str, int]:
    """A preset's fields; the intermediate size is four times the hidden size."""
    fields = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return fields | {"intermediate_size": 4 * hidden} | more


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)
