"""ALBERT: one layer's weights for all layers, word embeddings narrower than the layers, sentence order to predict.

Parameters have Hugging Face's names but within the layers and in the masked word head, which are `encoder`'s and
`pretraining`'s as in BERT; `parameter_names.ALBERT` says which are which. Source: Lan, Chen, Goodman, Gimpel, Sharma
and Soricut, "ALBERT" (2020).
"""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastbert.backends import linear
from fastbert.models import parameter_names
from fastbert.models.config import WITH_RUNNING, ModelConfig, sizes
from fastbert.models.encoder import Embeddings, Encoder, Layer
from fastbert.models.layers import Dropout, Linear, LinearGELU, with_own_bias
from fastbert.models.pretraining import PreTrainingModel, WordPredictions


@dataclasses.dataclass(frozen=True)
class AlbertConfig(ModelConfig):
    """Sizes and probabilities of an ALBERT, see `ModelConfig`; defaults (version 2's xxlarge) are Hugging Face's.

    `embedding_size` is E, the width of the embeddings before their projection to H. The `num_hidden_layers` are
    `num_hidden_groups` groups of equal size, one after another; the layers of a group share one set of weights, which
    is `inner_group_num` layers long. `classifier_dropout_prob` is the sentence order head's. Presets "base", "large",
    "xlarge" and "xxlarge", and "tiny", "mini" and "small" with the sizes of BERT's.

    Raises:
        ValueError: a value that no ALBERT can have.
    """

    vocab_size: int = 30000
    hidden_size: int = 4096
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    embedding_size: int = 128
    num_hidden_groups: int = 1
    inner_group_num: int = 1
    classifier_dropout_prob: float = 0.1

    presets: ClassVar[dict[str, dict[str, int]]] = {
        "tiny": sizes(2, 128, 2, embedding_size=64),
        "mini": sizes(4, 256, 4),
        "small": sizes(4, 512, 8),
        "base": sizes(12, 768, 12),
        "large": sizes(24, 1024, 16),
        "xlarge": sizes(24, 2048, 16),
        "xxlarge": sizes(12, 4096, 64),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.num_hidden_layers % self.num_hidden_groups:
            raise ValueError(
                "num_hidden_layers must be a multiple of num_hidden_groups, so that every group has as many layers; "
                f"got {self.num_hidden_layers} and {self.num_hidden_groups}"
            )
        if self.norm in WITH_RUNNING:
            raise ValueError(
                f"norm {self.norm!r} keeps running statistics of a layer, and ALBERT's layers, which differ in them, "
                "are one: expected layer, instance or group"
            )
        if self.is_decoder:
            raise ValueError(
                "this ALBERT has is_decoder = False only, as that of transformers has, which takes no notice of it"
            )


class AlbertForPreTrainingOutput(NamedTuple):
    """What `AlbertForPreTraining` returns; a loss is None where its labels were not given.

    Attributes:
        loss: float32 scalar, the sum of the two below.
        mlm_loss: float32 scalar, the mean over labels that are not ignored; 0 where there are none.
        sop_loss: float32 scalar, likewise over sequences.
        prediction_logits: [M, V] at the labelled positions in order; without labels at all: [B, S, V] or [T, V].
        sop_logits: [B, 2].
    """

    loss: Tensor | None
    mlm_loss: Tensor | None
    sop_loss: Tensor | None
    prediction_logits: Tensor
    sop_logits: Tensor

    @property
    def sentence_loss(self) -> Tensor | None:
        """The sentence head's, by the name that every model has for it."""
        return self.sop_loss

    @property
    def sentence_logits(self) -> Tensor:
        return self.sop_logits


class AlbertModel(Encoder):
    """The ALBERT encoder with its pooler.

    Weights start as N(0, initializer_range), biases as 0, LayerNorm as 1 and 0, the padding token's embedding as 0.
    The gradient of a weight that several layers share is their sum in float32, the last layer's first, whatever the
    dtypes of weight and activations.
    """

    config_class, names = AlbertConfig, parameter_names.ALBERT

    def __init__(self, config: AlbertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config, config.embedding_size)
        groups = ([Layer(config) for _ in range(config.inner_group_num)] for _ in range(config.num_hidden_groups))
        self.encoder = nn.ModuleDict({
            "embedding_hidden_mapping_in": Linear(config.embedding_size, config.hidden_size),
            "albert_layer_groups": nn.ModuleList(
                nn.ModuleDict({"albert_layers": nn.ModuleList(layers)}) for layers in groups
            ),
        })  # fmt: skip
        self.pooler = Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.apply(self._init_weights)

    def embed(self, *ids: Tensor | None, seed: Tensor | None) -> Tensor:
        x = self.embeddings(*ids, seed=seed)
        return self.encoder["embedding_hidden_mapping_in"](x)

    def layers(self) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        groups = [group["albert_layers"] for group in self.encoder["albert_layer_groups"]]
        uses = self.config.num_hidden_layers // len(groups)
        return [layer for group in groups for layer in [shared(layer) for layer in group] * uses]

    def pool(self, first: Tensor) -> Tensor:
        return self.pooler(first)


def shared(layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """`layer`, to be called several times in one forward pass: its weights' gradients are then added up in float32.

    autograd does so by itself where what is added is float32. A weight that is computed with in bfloat16, because it is
    itself or because autocast casts it, is cast once for the pass, and every use of the copy hands a float32 gradient
    back. (Autocast's own copy would collect its uses' gradients in bfloat16.)
    """
    weights = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
    if not weights or not torch.is_grad_enabled():
        return layer
    device = next(iter(weights.values())).device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else None
    cast = _cast_by_autocast(layer, device) if autocast else ()
    copies = {}
    for name, weight in weights.items():
        copy = weight.detach().to(dtype if name in cast and weight.dtype != torch.float64 else weight.dtype)
        if copy.dtype in (torch.bfloat16, torch.float16):
            copies[name] = weight.float(), copy

    def use(*arguments: Any) -> Tensor:
        own = {name: _Use.apply(*pair) for name, pair in copies.items()}
        # What is cast beside those, as for products too small for the chosen library, is cast for this use alone.
        with torch.autocast(device, dtype, cache_enabled=False) if autocast else contextlib.nullcontext():
            return functional_call(layer, own, arguments)

    return use if copies or autocast else layer


def _cast_by_autocast(layer: nn.Module, device: str) -> set[str]:
    """Names of the weights that are cast for their products; the other ops take float32 beside bfloat16."""
    if device == "cpu" and not linear.casts_weights(torch.get_autocast_dtype(device)):
        return set()
    products = {name: module for name, module in layer.named_modules() if isinstance(module, Linear | LinearGELU)}
    return {f"{name}.weight" for name in products} | {f"{name}.bias" for name in with_own_bias(layer)}


class _Use(torch.autograd.Function):
    """One use of a weight: the copy to compute with, [N, K] or [N], whose gradient is the weight's, in float32."""

    @staticmethod
    def forward(ctx, weight, copy):
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, dcopy):
        return dcopy.float(), None


class AlbertForPreTraining(PreTrainingModel):
    """ALBERT with its two pretraining heads: masked words (decoder tied to the word embedding) and sentence order."""

    encoder_class, sentence_label = AlbertModel, "sentence_order_label"
    config_class, names = AlbertConfig, parameter_names.ALBERT

    def __init__(self, config: AlbertConfig):
        super().__init__(config)
        self.predictions = WordPredictions(config, config.embedding_size)
        dropout, classifier = Dropout(config.classifier_dropout_prob), nn.Linear(config.hidden_size, 2)
        self.sop_classifier = nn.Sequential(OrderedDict(dropout=dropout, classifier=classifier))
        for head in (self.predictions, self.sop_classifier):
            head.apply(self._init_weights)

    @property
    def sentence_head(self) -> nn.Sequential:
        return self.sop_classifier

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
        sentence_order_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> AlbertForPreTrainingOutput:
        """As `BertForPreTraining.forward`, with another question about a pair, and `sop_loss` its loss.

        Args:
            sentence_order_label: int64 [B], 0 where the two texts are in order, 1 where they are swapped, -100 to
                ignore.

        Returns:
            AlbertForPreTrainingOutput.

        Raises:
            ValueError, TypeError: as `BertForPreTraining.forward`.
        """
        return AlbertForPreTrainingOutput(*self.predict(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen, labels,
            sentence_order_label, masked_positions,
        ))  # fmt: skip
