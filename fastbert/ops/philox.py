"""The random numbers of dropout: Philox4x32-7 in plain PyTorch, the twin of `csrc/philox.h`.

Whether an element is dropped depends on the seed and on where it stands, never on backend, tiling or threads. One call
of Philox gives four words for neighbours, read from the lowest bit of the first on: as eight lanes of 16 bits, lane j
being bits `16 * (j % 2)` and up of word `j // 2`, or, in attention, as sixteen of 8 bits, lane j being bits
`8 * (j % 4)` and up of word `j // 4`. With lanes of b bits an element is kept where its lane is at least
`t = floor(p * 2**b + 0.5)`, which is at least 1 where p > 0 and at most `2**b - 1` where p < 1, and is then multiplied
by `2**b / (2**b - t)`: the mean is right for the probability that was drawn.

The words are those of `fastbert.counter_random`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.counter_random import philox_words
from fastbert.ops.checks import as_float, as_int

CONTRACT = 3  # runs keep it, and say where it has changed; 1 was ten rounds, 2 another order of large corpora
Word = int | Tensor


def philox(c0: Word, c1: Word, c2: Word, c3: Word, seed: Word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 over int64 tensors that hold 32-bit words.

    Args:
        c0, c1, c2, c3: the counter's words; int64 tensors (or ints) that broadcast together, at least one a tensor.
        seed: the 64-bit key, low word first; an int, or an int64 tensor that broadcasts with the counter.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    return tuple(torch.broadcast_tensors(*philox_words(c0, c1, c2, c3, seed)))


def lanes(columns: int, c1: Word, c2: Word, c3: int, seed: Tensor, bits: int = 16) -> Tensor:
    """Lanes of `bits` bits, 32, 16 or 8, of `columns` neighbours: [..., columns] int64, each in [0, 2**bits).

    A counter gives `128 // bits` lanes: that of a column is `(column // (128 // bits), c1, c2, c3)`. `c1` and `c2` are
    ints or int64 tensors whose last axis is 1; the other axes broadcast. `seed` is int64 [1].
    """
    groups = torch.arange(-(-columns * bits // 128), device=seed.device)
    words = torch.stack(philox(groups, c1, c2, c3, seed), -1)  # [..., groups, 4]
    parts = torch.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1)
    return parts.flatten(-3)[..., :columns]


def threshold(p: float, bits: int = 16) -> int:
    """`t` of the dropout contract for probability `p` and lanes of `bits` bits.

    Raises:
        ValueError: unless 0 <= p <= 1. TypeError: p is no number.
    """
    p = as_float("dropout_p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p is the probability of dropping an element: expected 0 <= dropout_p <= 1, got {p}")
    if p in (0.0, 1.0):
        return int(p) << bits
    return min(max(math.floor(p * 2**bits + 0.5), 1), 2**bits - 1)


def scale(t: int, bits: int = 16) -> float:
    """What a kept element is multiplied by; 0.0 where everything is dropped."""
    return 2**bits / (2**bits - t) if t < 2**bits else 0.0


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
    return _draw(1, device) if seed is None else seed


def draw_seeds(probabilities: Sequence[float], device: torch.device) -> list[Tensor | None]:
    """A seed, int64 [1], for each op that drops with one of these probabilities, None for one that drops nothing.

    They are those that the ops would draw themselves, one after another, and cost one kernel on a GPU, not one each.
    """
    count = sum(p > 0 for p in probabilities)
    seeds = iter(_draw(count, device).split(1) if count else ())
    return [next(seeds) if p > 0 else None for p in probabilities]


def _draw(count: int, device: torch.device) -> Tensor:
    # randint's upper end is exclusive: every int64 but the largest.
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)
