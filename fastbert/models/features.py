"""What the layers of a model say of packed texts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastbert.models.elmo import ElmoModel
from fastbert.models.encoder import Encoder


def hidden_states(model: Encoder | ElmoModel, packed: Mapping[str, Tensor | int]) -> Sequence[Tensor]:
    """The embeddings and every layer's output, [T, H] each; `packed` are the arguments of the model's `forward`."""
    if isinstance(model, ElmoModel):
        return model(**packed).hidden_states
    states: list[Tensor] = []
    layers = list(model.layers())  # an ALBERT's are all the same module

    def before(module: torch.nn.Module, arguments: tuple) -> None:
        states.append(arguments[0])

    def behind(module: torch.nn.Module, arguments: tuple, out: tuple[Tensor, Tensor]) -> None:
        if len(states) == len(layers):
            states.append(out[0])

    hooks = [layer.register_forward_pre_hook(before) for layer in set(layers)]
    hooks += [layer.register_forward_hook(behind) for layer in set(layers)]
    try:
        model(**packed)
    finally:
        for hook in hooks:
            hook.remove()
    return states
