"""LSTMs over packed sequences, forward and backward in time: which token each step of each sequence reads.

torch's LSTM takes a padded batch [B, S, H]. Its packed form (`pack_padded_sequence`) and its own two directions are
several times slower on a CPU, as oneDNN computes neither. So sequences of like length are padded together, and for the
backward direction each is turned around within its own length: behind its end either direction sees padding, which
cannot reach back.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fastbert.models import inputs

SHORTER = 0.75  # a sequence this much shorter than the longest of its rectangle begins the next one
FEWEST = 8  # sequences of a rectangle: fewer are slower to compute than their padding


def turned_places(lengths: Tensor, longest: int) -> Tensor:
    """int64 [B, S]: of each place of a sequence the one as far from its end, which is its own inverse; 0 at padding."""
    places = torch.arange(longest, device=lengths.device)
    return (lengths.unsqueeze(1) - 1 - places).clamp(min=0)


class Rectangles(NamedTuple):
    """How T packed tokens are laid out for an LSTM.

    Attributes:
        shapes: B and S of each padded batch.
        reads: int64 [sum of B * S] for either direction: the packed token at each place; at padding some token.
        lies: int64 [T] for either direction: the place of each packed token, its own inverse to `reads`.
    """

    shapes: list[tuple[int, int]]
    reads: tuple[Tensor, Tensor]
    lies: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> Self:
        """Of sequences as `cu_seqlens`, int32 [B + 1], bounds them; at least one token.

        On a CPU they are sorted by length and cut into several rectangles. Elsewhere that would wait for the device:
        there it is one, of `max_seqlen` steps.
        """
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        device = cu_seqlens.device
        groups = [(torch.arange(len(starts), device=device), max_seqlen)]
        if cu_seqlens.is_cpu:
            groups = _groups(lengths)
        base, reads, offset = torch.zeros_like(starts), ([], []), 0
        for some, longest in groups:
            forth = torch.arange(longest, device=device).expand(len(some), -1)
            for made, places in zip(reads, (forth, turned_places(lengths[some], longest)), strict=True):
                made.append(inputs.within(starts[some].unsqueeze(1) + places, tokens).flatten())
            base[some] = offset + longest * torch.arange(len(some), device=device)
            offset += longest * len(some)
        sequence = inputs.sequence_of(cu_seqlens, tokens)
        place = torch.arange(tokens, device=device) - starts[sequence]
        lies = base[sequence] + place, base[sequence] + lengths[sequence] - 1 - place
        return cls([(len(some), longest) for some, longest in groups], tuple(map(torch.cat, reads)), lies)

    def through(self, lstm: nn.LSTM, x: Tensor, direction: int) -> Tensor:
        """Packed x [T, H] through an LSTM -> [T, W]; direction 0 is forward in time, 1 backward."""
        padded = x.index_select(0, self.reads[direction])
        parts = padded.split([rows * steps for rows, steps in self.shapes])
        ends = [lstm(part.view(*shape, -1))[0].flatten(0, 1) for part, shape in zip(parts, self.shapes, strict=True)]
        return torch.cat(ends).index_select(0, self.lies[direction])


def _groups(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Sequences of like length, int64 [some], and the longest one's; those without a token are left out."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = [size for size in lengths[order].tolist() if size]
    groups, first = [], 0
    for i in range(1, len(sizes) + 1):
        ends = i == len(sizes)
        if ends or (sizes[i] < SHORTER * sizes[first] and i - first >= FEWEST and len(sizes) - i >= FEWEST):
            groups.append((order[first:i], sizes[first]))
            first = i
    return groups
