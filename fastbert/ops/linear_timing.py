"""Which library of products is the fastest here for one shape: timed, for who asks. Without asking nothing is timed."""

import statistics
import time

import torch
from torch import Tensor

from fastbert.backends import linear as kernels
from fastbert.backends import native, requested
from fastbert.ops.linear import linear


def fastest(rows: int, size: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The fastest library for x [rows, size] and weight [inner, size], forward and backward, timed within a second.

    Args:
        rows, size, inner: of the product.
        dtype: float32 or bfloat16, in which it is computed.

    Returns:
        Its name, never "auto", and why in words. One whose results do not equal torch's to rounding does not count. So
        that a repeated run takes the same one, what is usual for the processor (`use_linear`'s "auto") stays unless
        another is faster by more than a tenth.
    """
    first = "torch" if dtype == torch.float32 or kernels.bfloat16_products else "widened"
    missing = {"onednn": kernels.onednn_missing, "fastbert": native.cpu_missing}
    others = [name for name, why in missing.items() if not why and rows * size * inner >= kernels.SMALL[name, dtype]]
    in_vain = dtype == torch.bfloat16 and kernels.bfloat16_products  # "fastbert" computes in float32
    if in_vain or requested() == "reference":
        others = [name for name in others if name != "fastbert"]
    if not others:
        return first, f"{rows} x {size} x {inner} is small, or no other library is there"
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, size), (inner, size), (rows, inner)
    x, weight, dy = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    inputs = x.requires_grad_(), weight.requires_grad_(), torch.zeros(inner, dtype=dtype, requires_grad=True)

    def run(name: str) -> list[Tensor]:
        with kernels.use_linear(name):
            y = linear(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def agree(name: str) -> bool:
        pairs = zip(run(name), run(first), strict=True)
        return all((ours - theirs).abs().max() <= rounding * theirs.abs().max() for ours, theirs in pairs)

    wrong = [name for name in others if not agree(name)]
    seconds: dict[str, list[float]] = {name: [] for name in (first, *others) if name not in wrong}
    end = time.perf_counter() + 0.3 * len(seconds)
    while len(seconds[first]) < 3 or time.perf_counter() < end:
        for name, taken in seconds.items():
            start = time.perf_counter()
            run(name)
            taken.append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    took = [f"{name} took {milliseconds:.1f} ms" for name, milliseconds in median.items()]
    best = settle(median, usual=kernels.chosen(dtype))
    return best, ", ".join(took + [f"{name} differs by more than rounding" for name in wrong])


def settle(milliseconds: dict[str, float], usual: str) -> str:
    """The fastest; of those within a tenth of it the usual one, else the first in the order of `NAMES`."""
    near = [name for name, taken in milliseconds.items() if taken <= 1.1 * min(milliseconds.values())]
    return min(near, key=lambda name: (name != usual, kernels.NAMES.index(name)))
