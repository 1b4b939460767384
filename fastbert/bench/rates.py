"""What the machine can do at most, measured: the rate of a copy and of a matrix product."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastbert.backends.linear import bfloat16_products
from fastbert.bench.problem import DTYPES
from fastbert.bench.timing import Call, Stats, interleaved


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy, read and written ones together; operations a second of a matrix product by dtype."""

    copy: Stats
    matmul: dict[str, Stats]


def copy(size: int) -> Call:
    """A copy that moves `size` bytes, half of them read and half written."""
    source = torch.ones(max(1, size // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(dtypes: Sequence[str], size: int, width: int, repeats: int = 7) -> Rates:
    """The rates of a copy of `size` bytes, which no cache should hold, and of a product [W, W] by [W, W].

    On a processor without bfloat16 products a 16-bit dtype has float32's rate: so are its products best computed.
    """
    dtypes = ["float32", *(name for name in dtypes if name != "float32")]
    narrow = torch.get_default_device().type == "cuda" or bfloat16_products
    factors = {name: torch.randn(2, width, width).to(DTYPES[name]) for name in dtypes if name == "float32" or narrow}
    calls = {name: lambda a=a, b=b: a @ b for name, (a, b) in factors.items()}
    times = interleaved({"copy": copy(size), **calls}, repeats=repeats)
    rates = {name: _rate(2 * width**3, times[name]) for name in calls}
    return Rates(_rate(size, times["copy"]), {name: rates.get(name, rates["float32"]) for name in dtypes})


def _rate(amount: float, seconds: Stats) -> Stats:
    return Stats(amount / seconds.p80, amount / seconds.median, amount / seconds.p20)
