"""Models that `transformers` made, computed by this package's ops: `patch`, `unpatch`, `patched`, `register_attention`.

`swap` exchanges a model's class for one whose `forward` is ours; `kinds` knows where each type of model has its parts;
`encoder` takes packed tokens through them; `words` computes the masked word loss; `padding` keeps heads from reading
padding; `interface` is attention alone.
transformers is imported when one of these functions is called, never by `import fastbert`.
"""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from fastbert.extras import missing

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Computes the encoders within a model by this package's ops, on packed tokens.

    Padding is removed once before the first layer and put back once after the last. Attention, linear products, GELU
    with its bias, and dropout with residual and LayerNorm are those of this package; parameters and their names,
    `state_dict`, `save_pretrained` and the class's name stay. Of `...ForMaskedLM`, and of `...ForPreTraining`
    with the labels of both heads, words' logits are in training computed only where labels are, for the loss:
    `out.logits` (`out.prediction_logits`) is then None. Logits of `...ForQuestionAnswering` are -1e4 at padding.

    Rows of `last_hidden_state` at padding are 0. What cannot be packed is computed as before, with a warning that says
    once why: `output_attentions`, masks of three and four axes, masks whose first token is padding, cross-attention,
    decoders and caches, hooks on a layer's parts, and tracing or export.

    Args:
        model: of `transformers` 5, of type bert, roberta, xlm-roberta, albert, electra, ernie or distilbert with any
            head, or any module that holds such models: of `sentence-transformers`, of `peft`, of your own.

    Returns:
        The same object. Patching it again changes nothing.

    Raises:
        ImportError: transformers is not installed.
        ValueError: it holds no such model, or one has a part that the ops do not compute, which the message names;
            nothing is changed then.
    """
    _check_installed("fastbert.patch needs")
    from fastbert.patching import swap

    swap.patch(model)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`: every model within computes as transformers wrote it. Returns the same object.

    A model that is not patched stays as it is.

    Raises:
        ImportError: transformers is not installed.
    """
    _check_installed("fastbert.unpatch needs")
    from fastbert.patching import swap

    swap.unpatch(list(model.modules()))
    return model


@contextlib.contextmanager
def patched(model: Model) -> Iterator[Model]:
    """Within the `with` block the model is patched; what was patched before stays so behind it.

    Yields the model; raises as `patch` does.
    """
    _check_installed("fastbert.patched needs")
    from fastbert.patching import swap

    changed = swap.patch(model)
    try:
        yield model
    finally:
        swap.unpatch(changed)


def register_attention() -> None:
    """Makes `attn_implementation="fastbert"` known to transformers, for attention alone; `patch` does not need it.

    Any model of transformers that goes through its attention interface can then be loaded with
    `from_pretrained(..., attn_implementation="fastbert")` or changed by `model.set_attn_implementation("fastbert")`.
    Padding is removed before attention and put back behind it, in every layer. Full and causal self-attention with a
    padding mask run; a call with anything else, such as a cache or a window, raises ValueError.

    Raises:
        ImportError: transformers is not installed.
    """
    _check_installed("fastbert.register_attention needs")
    from fastbert.patching import interface

    interface.register()


def _check_installed(what: str) -> None:
    message = missing(what, "transformers")
    if message is not None:
        raise ImportError(message)
