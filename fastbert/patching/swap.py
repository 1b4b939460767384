"""Exchanges the class of models for a subclass with our `forward`, and back.

A class, not a method of the instance: copies, pickles and replicas of the model stay patched, and everything that asks
for the class's name, its signature or `isinstance` is told the same as before.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastbert.patching import encoder, obstacles, words
from fastbert.patching.kinds import ENCODERS, WORD_HEADS


def patch(model: nn.Module) -> list[nn.Module]:
    """Patches every model within; returns those that were not patched before. Raises as `fastbert.patch` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastbert.patch takes a model, a torch.nn.Module, got {type(model).__qualname__}")
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    found = [module for module in names if _table(type(module)) is not None]
    encoders = [module for module in names if isinstance(module, tuple(ENCODERS))]
    if not encoders:
        raise ValueError(_nothing_found(model))
    for module in {*found, *encoders}:
        if module not in found:
            base = next(base.__name__ for base in ENCODERS if isinstance(module, base))
            raise ValueError(
                f"{names[module]} ({type(module).__name__}) has a `forward` of its own, which patching would leave "
                f"out: fastbert.patch takes {base} and subclasses that keep its `forward`"
            )
        if obstacles.has_own_forward(module):
            raise ValueError(
                f"{names[module]} ({type(module).__name__}) has a `forward` of its own on the instance, which would "
                "hide ours: patch the model before something wraps it"
            )
    for module in encoders:
        why = obstacles.in_model(module, _kind_of(type(module), ENCODERS))
        if why is not None:
            raise ValueError(f"{names[module]} ({type(module).__name__}) cannot be patched: {why}")
    changed = [module for module in found if _original(type(module)) is None]
    for module in changed:
        vars(module).pop("forward", None)  # its class's own, see has_own_forward
        module.__class__ = _patched_class(type(module))
    return changed


def unpatch(modules: Iterable[nn.Module]) -> None:
    """Gives those that are patched their class back."""
    for module in modules:
        original = _original(type(module))
        if original is not None:
            module.__class__ = original


# ---- which -------------------------------------------------------------------------------------------------------


def _original(cls: type) -> type | None:
    """The class that a patched class was made from."""
    return vars(cls).get("_fastbert_original")


def _kind_of(cls: type, table: dict[type, Any]) -> Any:
    """The entry of transformers' class whose `forward` this class has; None for none."""
    cls = _original(cls) or cls
    for base, kind in table.items():
        if issubclass(cls, base) and cls.forward is base.forward:
            return kind
    return None


def _table(cls: type) -> dict[type, Any] | None:
    return next((table for table in (ENCODERS, WORD_HEADS) if _kind_of(cls, table) is not None), None)


def _nothing_found(model: nn.Module) -> str:
    types = ", ".join(base.__name__ for base in ENCODERS)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return (
        f"{type(model).__name__}{f' of type {kind!r}' if kind else ''} holds no model that fastbert.patch takes, which "
        f"are {types} of transformers"
    )


# ---- the class ---------------------------------------------------------------------------------------------------


@functools.cache
def _patched_class(cls: type) -> type:
    table = _table(cls)
    compute = encoder.encode if table is ENCODERS else words.predict
    namespace = {
        "forward": _forward(cls.forward, functools.partial(compute, _kind_of(cls, table))),
        "_fastbert_original": cls,
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), namespace)


def _forward(original: Callable, compute: Callable) -> Callable:
    """`compute(self, original, given)`, given being the arguments by name, with the original's signature."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **arguments: Any) -> Any:
        return compute(self, original, dict(zip(names, args, strict=False)) | arguments)

    return forward


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Pickles name the original class; the patched one is made again where they are loaded."""
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_new, (_original(type(self)),), *state)


def _new(cls: type) -> nn.Module:
    made = _patched_class(cls)
    return made.__new__(made)
