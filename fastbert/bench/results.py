"""Results as a CSV file: written, read again, and held against those of an earlier run."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert import files
from fastbert.bench.machine import machine
from fastbert.bench.measure import COPY, Row
from fastbert.bench.settings import SITTINGS

KEY = "op", "case", "pass", "dtype", "variant", "reference"
RATIOS = "ratio_least", "ratio_fastest", "ratio_most"  # of the fastest calls of each sitting: least, median, most
NOISE = 0.1  # what is less is no change: where the linker or the allocator puts things does as much


def csv_text(rows: Sequence[Row]) -> str:
    """The rows under a header, each ended by the columns of `machine()`; None is an empty cell."""
    rows = [{**row, **machine()} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a bench.csv.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or that of a run that was cut off.
    """
    with files.naming(path):
        text = path.read_bytes().decode(errors="replace")
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error:  # such as of a page instead of a table
        rows = []
    if rows and None in rows[-1].values():
        raise ValueError(f"{path} is cut off in its last line: copy it again, or measure it anew")
    lacking = [column for column in (*KEY, *RATIOS, "sittings") if not rows or rows[0].get(column) is None]
    if lacking:
        raise ValueError(
            f"{path} is no bench.csv of fastbert bench: it has no rows with {', '.join(lacking)}; give one that "
            "`fastbert bench` wrote"
        )
    sittings = max(int(row["sittings"]) for row in rows)
    if sittings < SITTINGS:
        raise ValueError(
            f"{path} is of a run that ended after {sittings} of {SITTINGS} sittings, or of long cases alone, which sit "
            "once: how much its ratios spread is not known; measure it anew, or other ops"
        )
    return rows


@dataclass(frozen=True)
class Change:
    """A ratio to the reference that moved by more than both runs' noise: a variant got faster or slower beside it."""

    key: tuple[str, ...]  # the columns of KEY
    before: tuple[float, float, float]  # RATIOS
    after: tuple[float, float, float]

    @property
    def factor(self) -> float:
        """Above 1 it is faster now."""
        return self.after[1] / self.before[1]

    def __str__(self) -> str:
        *where, variant, reference = self.key
        before, after = (f"{middle:.3g} [{low:.3g}, {high:.3g}]" for low, middle, high in (self.before, self.after))
        verdict = "faster" if self.factor > 1 else "slower"
        return f"{', '.join(where)}: {variant} is {verdict}, {before} times {reference}'s speed before, {after} now"


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other.

    Attributes:
        changes: the largest first.
        compared: how many ratios both runs have.
        alone: keys that one of the runs has and the other has not.
        notes: what differs between the two machines.
        once: how many ratios have too few sittings in one of the runs.
    """

    changes: list[Change]
    compared: int
    alone: list[tuple[str, ...]]
    notes: list[str]
    once: int = 0


def compare(old: Iterable[dict[str, str]], new: Iterable[dict[str, str]]) -> Comparison:
    """What changed between two runs, by ratios to the variant that each run measured in the same rounds.

    Absolute times are not compared: clocks and neighbours differ from run to run. A change counts where every sitting
    of one run has a higher ratio of fastest calls than any of the other, and where besides their medians differ by more
    than NOISE.
    """
    old, new = list(old), list(new)
    before, after = _ratios(old), _ratios(new)
    once = {key for rows in (old, new) for key in _ratios(rows, whole=False)}
    both = [key for key in after if key in before]
    changes = [Change(key, before[key], after[key]) for key in both if _differ(before[key], after[key])]
    changes.sort(key=lambda change: max(change.factor, 1 / change.factor), reverse=True)
    notes = [
        f"{column} was {old[0][column]}, now {new[0][column]}"
        for column in ("gpu", "cpu", "threads", "isa", "torch", "python", "fastbert")
        if old[0].get(column, "") != new[0].get(column, "")
    ]
    alone = [key for key in {**before, **after} if key not in both and key not in once]
    return Comparison(changes, len(both), alone, notes, len(once))


def _ratios(rows: Iterable[dict[str, str]], whole: bool = True) -> dict[tuple[str, ...], tuple[float, float, float]]:
    """RATIOS of what sat as often as a run does, or, if not `whole`, of what sat less often."""
    found = {}
    for row in rows:
        wanted = row["ratio_fastest"] and (int(row["sittings"]) == SITTINGS) == whole
        if wanted and row["variant"] not in (row["reference"], COPY):
            low, middle, high = (float(row[name]) for name in RATIOS)
            found[tuple(row[name] for name in KEY)] = (low, middle, high)
    return found


def _differ(before: tuple[float, float, float], after: tuple[float, float, float]) -> bool:
    apart = before[2] < after[0] or after[2] < before[0]
    change = after[1] / before[1]
    return apart and max(change, 1 / change) > 1 + NOISE
