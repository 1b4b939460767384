"""Why a model, or one call of it, is not computed by this package's ops: a sentence, or None where it is."""

import warnings
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastbert.patching.kinds import ENCODERS, Encoder, LayerParts, gelu_form

HARMLESS = {  # what heads pass on that changes nothing of the encoder
    "return_dict", "output_hidden_states", "output_attentions", "use_cache", "num_items_in_batch",
}  # fmt: skip
TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "task_type_ids"}
_told: set[str] = set()


def tell(why: str) -> None:
    """Warns of a call that is computed as before; once for each reason."""
    if why not in _told:
        _told.add(why)
        warnings.warn(
            f"a patched model computes this call as transformers does, without packing: {why}. This is said once.",
            stacklevel=6,
        )


# ---- the model -----------------------------------------------------------------------------------------------------


def in_model(model: nn.Module, kind: Encoder) -> str | None:
    """What in the model stands against packing."""
    home = next(base.__module__ for base in ENCODERS if isinstance(model, base))  # where its own classes come from
    if getattr(model.config, "is_decoder", False):
        return "it is a decoder (config.is_decoder)"
    for container in kind.containers(model):
        why = _in_container(container, home)
        if why is not None:
            return _named(model, container, why)
    for leaf in (model.embeddings.LayerNorm, model.embeddings.dropout, kind.project(model)):
        why = _in_leaf(leaf)
        if why is not None:
            return _named(model, leaf, why)
    for layer in dict.fromkeys(kind.layers(model)):
        try:
            parts = kind.parts(layer)
        except AttributeError as error:
            return _named(model, layer, f"it has other parts than transformers' own layer: {error}")
        found = _in_layer(parts, home)
        if found is not None:
            return _named(model, *found)
    if torch_modules._has_any_global_hook():
        return "hooks of all modules are registered, which would not see those within a layer"
    return None


def _in_layer(parts: LayerParts, home: str) -> tuple[nn.Module, str] | None:
    """The module that stands against it, and why."""
    for container in parts.containers:
        why = _in_container(container, home)
        if why is not None:
            return container, why
    form = gelu_form(parts.activation)
    if form is None:
        return parts.containers[-1], f"its activation is {_name(parts.activation)}, not a GELU"
    for dropout in (parts.attention_dropout, parts.dense_dropout, parts.outer_dropout):
        if dropout is not None and type(dropout) is not nn.Dropout:
            return dropout, f"it is {_name(dropout)}, not nn.Dropout"
    return next(((leaf, why) for leaf in parts.leaves if (why := _in_leaf(leaf)) is not None), None)


def _in_leaf(leaf: Any) -> str | None:
    """Of a module that the ops compute; one that is none of torch's own is called, and its hooks with it."""
    if type(leaf) in (nn.Linear, nn.LayerNorm, nn.Dropout):
        return _not_called(leaf)
    if isinstance(leaf, nn.Module) and leaf._forward_pre_hooks_with_kwargs:  # adapter_names of peft is one
        return "it has a hook on its arguments, which may count texts where there are packed tokens"
    return None


def _in_container(module: nn.Module, home: str) -> str | None:
    if type(module).__module__ != home:
        return _foreign(module)
    if getattr(module, "chunk_size_feed_forward", 0):
        return f"chunk_size_feed_forward is {module.chunk_size_feed_forward}, and packed tokens are not cut into chunks"
    return _not_called(module)


def _not_called(module: nn.Module) -> str | None:
    if has_own_forward(module):
        return "it has a `forward` of its own, which would not be called"
    return "it has hooks, which would not be called" if _has_hooks(module) else None


def _foreign(module: nn.Module) -> str:
    return f"it is {_name(module)}, none of transformers' own layers"


def _name(module: Any) -> str:
    cls = module if isinstance(module, type) or not isinstance(module, nn.Module) else type(module)
    return f"{cls.__module__}.{getattr(cls, '__qualname__', cls)}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether something was put over its class's; transformers 5.0 leaves that itself behind on layers."""
    own = vars(module).get("forward")
    return own is not None and own != MethodType(type(module).forward, module)


def _has_hooks(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # transformers leaves its own behind once hidden states were asked for; they are idle at other times.
    return any(not hook.__module__.startswith("transformers.") for hook in module._forward_hooks.values())


def _named(model: nn.Module, module: nn.Module, why: str) -> str:
    """The reason behind the module's name."""
    name = next((name for name, each in model.named_modules() if each is module), None)
    return why if name is None else f"of {name}: {why}"


# ---- a call --------------------------------------------------------------------------------------------------------


def in_recording() -> str | None:
    """Whether the call is recorded for later ones."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "a trace or an export would keep this batch's lengths for every other batch"
    return None


def in_call(model: nn.Module, given: dict[str, Any], shape: torch.Size) -> str | None:
    """What in the arguments, by name, stands against packing; `shape` is [B, S]."""
    for name, value in given.items():
        if name not in HARMLESS and name not in TAKEN and value is not None and value is not False:
            return f"{name} was given"
    config = model.config
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        return "output_attentions needs attention's weights, which are never stored"
    if type(given.get("output_hidden_states") or False) is not bool:
        return "output_hidden_states names single layers"
    if getattr(config, "is_causal", None):
        return "config.is_causal"
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        form = f"has {mask.dim()} axes" if isinstance(mask, Tensor) else f"is a {type(mask).__qualname__}"
        return f"attention_mask {form}, where padding is marked by [batch, tokens]"
    if mask.shape != shape:
        return "attention_mask has another shape than the words"
    return None if mask[:, :1].all() else "a sequence begins with padding: pad on the right"
