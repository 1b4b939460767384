"""The norm of many gradients by the kernels of csrc/cuda/gradient_norm.cu; torch's own functions do it on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backends.native import DTYPES, launcher


def gradient_norm(gradients: Sequence[tuple[Tensor, Tensor | None]], max_norm: float) -> Tensor:
    """The L2 norm of all gradients together, and the factor that makes it at most `max_norm`.

    Args:
        gradients: on one GPU, at least one; each of any shape and strides, float32, bfloat16 or float16, with a uint8
            tensor [V] of the rows that count, not 0 where they do, or None where all do.
        max_norm: the largest norm allowed, >= 0.

    Returns:
        float32 [2]: the norm, and min(1, max_norm / (norm + 1e-6)). Nothing waits for the device.
    """
    device = gradients[0][0]
    read = [(grad.resolve_neg().contiguous(), named) for grad, named in gradients]
    fields = [
        (grad.data_ptr(), 0 if named is None else named.data_ptr(), grad.numel(),
         0 if named is None else grad.numel() // max(1, len(named)), DTYPES[grad.dtype])
        for grad, named in read
    ]  # fmt: skip
    module, launch = launcher(device)
    scratch = device.new_empty(module.gradient_norm_scratch(fields), dtype=torch.float64)
    norm = device.new_empty(2, dtype=torch.float32)
    module.gradient_norm(fields, max_norm, scratch.data_ptr(), norm.data_ptr(), launch)
    return norm
