"""Exchanges the class of models for a subclass with our `forward`, and back.

A class, not a method of the instance: copies, pickles and replicas of the model stay patched, and everything that asks
for the class's name, its signature or `isinstance` is told the same as before.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastbert.patching import encoder, obstacles, padding, words
from fastbert.patching.kinds import ANSWER_HEADS, ENCODERS, TOKEN_HEADS, WORD_HEADS

# transformers' class -> what is computed instead of its `forward`, of the model, that `forward` and arguments by name.
COMPUTED: dict[type, Callable[[nn.Module, Callable, dict[str, Any]], Any]] = {
    **{base: functools.partial(encoder.encode, kind) for base, kind in ENCODERS.items()},
    **{base: functools.partial(words.predict, head) for base, head in WORD_HEADS.items()},
    **dict.fromkeys(ANSWER_HEADS, padding.answer),
    **dict.fromkeys(TOKEN_HEADS, padding.classify),
}


def patch(model: nn.Module) -> list[nn.Module]:
    """Patches every model within; returns those that were not patched before. Raises as `fastbert.patch` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastbert.patch takes a model, a torch.nn.Module, got {type(model).__qualname__}")
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    found = [module for module in names if _base(type(module)) is not None]
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
        if _original(type(module)) is None and obstacles.has_own_forward(module):
            raise ValueError(
                f"{names[module]} ({type(module).__name__}) has a `forward` of its own on the instance, which would "
                "hide ours: patch the model before something wraps it"
            )
    for module in encoders:
        why = obstacles.in_model(module, ENCODERS[_base(type(module))])
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


def _base(cls: type) -> type | None:
    """The class of COMPUTED whose `forward` this class has; None for none."""
    cls = _original(cls) or cls
    return next((base for base in COMPUTED if issubclass(cls, base) and cls.forward is base.forward), None)


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
    namespace = {
        "forward": _forward(cls.forward, COMPUTED[_base(cls)]),
        "_fastbert_original": cls,
        "__init__": _initialize(cls),
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), namespace)


def _forward(original: Callable, compute: Callable) -> Callable:
    """`compute(self, original, given)`, given being the arguments by name, with the original's signature."""
    parameters = list(inspect.signature(original).parameters.values())[1:]
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **arguments: Any) -> Any:
        if len(args) > len(names) or any(name in arguments for name in names[: len(args)]):
            return original(self, *args, **arguments)  # for its message
        if not hasattr(type(self), "_fastbert_original"):  # kept by a wrapper, such as accelerate's, over `unpatch`
            return original(self, *args, **arguments)
        return compute(self, original, dict(zip(names, args, strict=False)) | arguments)

    return forward


def _initialize(cls: type) -> Callable:
    """A new model of a patched one's class, as `type(model)(config)` and `from_pretrained` make it, is not patched."""

    @functools.wraps(cls.__init__)
    def initialize(self: nn.Module, *args: Any, **arguments: Any) -> None:
        self.__class__ = cls
        self.__init__(*args, **arguments)

    return initialize


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Pickles name the original class; the patched one is made again where they are loaded."""
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_new, (_original(type(self)),), *state)


def _new(cls: type) -> nn.Module:
    made = _patched_class(cls)
    return made.__new__(made)
