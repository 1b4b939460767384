"""Phases of a run, each with sequences of another length: BERT's was 90 % of the steps at 128 tokens, then 512.

Attention costs a token as much as its sequence is long, so that most is learned from short ones, and long ones teach
the positions beyond (Devlin et al., "BERT", 2019, A.2).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Phase(NamedTuple):
    seq_len: int
    share: float


def parse_phases(texts: Sequence[str]) -> list[Phase]:
    """Phases of texts such as "128:0.9": the longest sequence in tokens, and the phase's share of the run.

    Raises:
        ValueError: a text that is not of this form, a share that is not above 0, or shares that are not 1 together.
    """
    phases = []
    for text in texts:
        length, _, share = text.partition(":")
        try:
            phases.append(Phase(int(length), float(share)))
        except ValueError:
            raise ValueError(
                f"a phase is its longest sequence in tokens, a colon and its share of the run, as in 128:0.9, got "
                f"{text!r}"
            ) from None
    total = sum(phase.share for phase in phases)
    if not all(phase.share > 0 for phase in phases) or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the phases' shares must be above 0, and 1 together, got {' '.join(texts)}: {total:g}")
    return phases


def phase_ends(phases: list[Phase], total: int) -> list[int]:
    """After how many of `total` steps, or milliseconds, each phase is over."""
    return [round(share * total) for share in itertools.accumulate(phase.share for phase in phases)]


def current_phase(phases: list[Phase], done: int, total: int) -> int:
    """The number, from 0, of the phase that a run is in; at its end the last one."""
    return sum(done >= end for end in phase_ends(phases, total)[:-1])
