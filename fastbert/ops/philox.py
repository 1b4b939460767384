"""The random numbers of dropout: Philox4x32-10 in plain PyTorch, the twin of `csrc/philox.h`.

Whether an element is dropped depends on the seed and on where it stands, never on backend, tiling or threads. One call
of Philox serves eight neighbours: its four words are read as eight 16-bit lanes, lane j being half `j % 2` (low first)
of word `j // 2`, and an element is kept where its lane is at least `t = floor(p * 65536 + 0.5)`.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math

import torch
from torch import Tensor

from fastbert.ops.checks import as_float, as_int

_MASK = 0xFFFFFFFF
Word = int | Tensor


def philox(c0: Word, c1: Word, c2: Word, c3: Word, seed: Word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 over int64 tensors that hold 32-bit words.

    Args:
        c0, c1, c2, c3: the counter's words; int64 tensors (or ints) that broadcast together, at least one a tensor.
        seed: the 64-bit key, low word first; an int, or an int64 tensor that broadcasts with the counter.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # Products of two 32-bit words wrap in int64, and the masks take the right bits all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def lanes(columns: int, c1: Word, c2: Word, c3: int, seed: Tensor) -> Tensor:
    """16-bit lanes of `columns` neighbours, [..., columns] int64, for counters `(column // 8, c1, c2, c3)`.

    `c1` and `c2` are ints or int64 tensors whose last axis is 1; the other axes broadcast. `seed` is int64 [1].
    """
    groups = torch.arange((columns + 7) // 8, device=seed.device)
    words = torch.stack(philox(groups, c1, c2, c3, seed), -1)  # [..., groups, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [..., groups, 4, 2]
    return halves.flatten(-3)[..., :columns]


def threshold(p: float) -> int:
    """`t` of the dropout contract for probability `p`.

    Raises:
        ValueError: unless 0 <= p <= 1. TypeError: p is no number.
    """
    p = as_float("dropout_p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p is the probability of dropping an element: expected 0 <= dropout_p <= 1, got {p}")
    return math.floor(p * 65536 + 0.5)


def scale(t: int) -> float:
    """What a kept element is multiplied by; 0.0 where everything is dropped."""
    return 65536 / (65536 - t) if t < 65536 else 0.0


def resolve_seed(seed: Tensor | int | None, t: int, device: torch.device) -> Tensor | None:
    """The seed an op runs with: None when nothing is dropped, the caller's, or one from torch's default generator.

    Args:
        seed: int64 [1] on `device`; an int, from -2**63 to 2**64 - 1 as `torch.manual_seed` takes it, of which the low
            64 bits count; or None to draw one, so that `torch.manual_seed` reproduces a run.

    Raises:
        ValueError: a given seed has another shape, dtype or device, or is an int outside of the range.
        TypeError: it is neither a tensor nor an int.
    """
    if seed is not None and not isinstance(seed, Tensor):
        seed = as_int("seed", seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must lie in [-2**63, 2**64), got {seed}")
        # Filled rather than copied, which on a GPU would wait for the device.
        seed = torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device):
        raise ValueError(
            f"seed must be an int64 tensor of shape [1] on {device}, got {seed.dtype} {list(seed.shape)} on "
            f"{seed.device}; pass an int, torch.tensor([number], device=...), or None to draw one"
        )
    if t == 0:
        return None
    if seed is None:
        # randint's upper end is exclusive: every int64 but the largest.
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return seed
