"""How ops are registered with torch."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fastbert", "FRAGMENT")


def register(function: Callable) -> Any:
    """Decorator: an opaque op `fastbert::<name>` that changes none of its inputs, for every device.

    What `torch.library.custom_op` makes, less its look for aliases at every call, which takes longer than the rest of
    a call (12 microseconds of 17); `torch.library.opcheck` looks for them in the tests.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.fastbert, name).default


def fake(name: str) -> Callable:
    """Decorator: says the shapes and dtypes of the results of `fastbert::<name>`, for torch.compile."""
    return torch.library.register_fake(f"fastbert::{name}", lib=_library)
