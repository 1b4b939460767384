"""Dropout whose mask follows from a seed and from where an element stands.

    y = x / (1 - p) where an element is kept, 0 where it is dropped;   dx is the same of dy

x is [..., N]. Nothing but the seed is saved. Element (row, column) is dropped by counter `(column // 8, row, 0, 0)`,
16-bit lane `column % 8` (see `philox`), as LayerNorm's is, so the mask is equal on every backend and any thread count.
Source: Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout" (2014).
"""

import torch
from torch import Tensor

from fastbert.backends import dropout as kernels
from fastbert.backends import pick, requested
from fastbert.ops import philox
from fastbert.ops.checks import check_activation, wide
from fastbert.ops.register import differentiated, once_differentiable, register


def dropout(x: Tensor, p: float = 0.5, seed: Tensor | int | None = None, *, backend: str | None = None) -> Tensor:
    """Drops elements with probability `p` and scales the others by `1 / (1 - p)`; there is no training flag.

    `torch.nn.functional.dropout` draws its numbers serially on a CPU and takes longer there than a LayerNorm.

    Args:
        x: [..., N] float32, bfloat16 or float16 (float64 on the reference backend). Autocast casts nothing here.
        p: probability that an element is dropped, rounded to a multiple of 1/65536; above 0 it is at least that, and
            below 1 at most 65535/65536.
        seed: an int, or int64 [1] on x's device; None draws one from torch's default generator.
        backend: runs on this backend or raises; None chooses by the tensor's device.

    Returns:
        [..., N] in x's dtype; x itself where p is 0.

    Raises:
        ValueError, TypeError: a shape, dtype, probability or seed that does not fit.
        RuntimeError: an explicit backend that cannot run here.
    """
    check_activation("dropout", "x", x)
    t = philox.threshold(p)
    seed = philox.resolve_seed(seed, t, x.device)
    if t == 0:
        return x
    chosen = pick("dropout", requested(backend), x)
    if differentiated(x):
        return _Dropout.apply(x, t, seed, chosen)
    return functions[chosen].dropout(x, t, seed)


class reference:  # a namespace, spelled as the backend is
    """The twin in plain PyTorch: any device, and float64, which is the truth of the tests."""

    @staticmethod
    def dropout(x: Tensor, t: int, seed: Tensor) -> Tensor:
        return dropped(wide(x), t, seed).to(x.dtype).contiguous()


def dropped(x: Tensor, t: int, seed: Tensor) -> Tensor:
    """x [..., N] with its dropped elements 0 and the others scaled, in x's dtype; the same both ways."""
    columns = x.shape[-1]
    row = torch.arange(x.numel() // columns, device=x.device).unsqueeze(-1)  # [M, 1]
    keep = philox.lanes(columns, row, 0, 0, seed) >= t
    return torch.where(keep.view(x.shape), x * philox.scale(t), 0.0)


functions = register(reference, kernels, dropout=lambda x, *_: x.new_empty(x.shape))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, seed, chosen):
        ctx.save_for_backward(seed)
        ctx.options = t, chosen
        return functions[chosen].dropout(x, t, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        t, chosen = ctx.options
        return functions[chosen].dropout(dy, t, seed), None, None, None
