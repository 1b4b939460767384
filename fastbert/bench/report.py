"""Results for people: a table in the terminal, and one page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbert.bench.measure import COPY, Row
from fastbert.bench.rates import Rates
from fastbert.bench.results import NOISE, Comparison
from fastbert.page import with_data

TEMPLATE = Path(__file__).with_suffix(".html")


def table(rows: Sequence[Row]) -> str:
    """A line for each result outside of sweeps, as wide as a terminal may be."""
    lines = [f"{'':22}{'ms':>9}{'p20':>9}{'p80':>9}{'ratio':>7}{'GB/s':>7}{'of copy':>9}{'TFLOP/s':>9}{'error':>10}"]
    before = ""
    for row in rows:
        if row["axis"] or row["variant"] == COPY:
            continue
        what = f"{row['op']}, {row['case']}, {row['dtype']}, {row['pass']}"
        if what != before:
            lines.append(what)
        before = what
        times = "".join(f"{row[key]:9.4g}" for key in ("median_ms", "p20_ms", "p80_ms"))
        ratio, rate, speed = (_cell(row[key], "g", 3) for key in ("ratio", "gb_per_s", "tflop_per_s"))
        error = _cell(row["error"], "e", 1) + ("!" if row["verified"] == "no" else "")
        share = "" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}"
        lines.append(f"  {row['variant']:20}{times}{ratio:>7}{rate:>7}{share:>9}{speed:>9}{error:>10}")
    return "\n".join(lines)


def _cell(value: object, style: str, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}{style}}"


def said(compared: Comparison) -> str:
    """What changed, in lines."""
    lines = [f"compared: {note}; ratios hold all the same where both variants gain alike" for note in compared.notes]
    lines += [str(change) for change in compared.changes]
    if not compared.compared:
        lines.append("the two runs have no ratio in common that can be compared")
    else:
        lines.append(
            f"{len(compared.changes)} of {compared.compared} ratios changed by more than the spread of both runs and "
            f"{NOISE:.0%}"
        )
    if compared.once:
        lines.append(f"{compared.once} had one sitting in one of the runs, as long cases do, and are not compared")
    if compared.alone:
        lines.append(f"{len(compared.alone)} are of one run alone, such as {', '.join(compared.alone[0])}")
    return "\n".join(lines)


def page(
    rows: Sequence[Row],
    ceilings: Rates,
    about: Mapping[str, object],
    missing: Mapping[str, str],
    compared: Comparison | None,
) -> str:
    """The report as HTML.

    Args:
        rows: of `measure`.
        ceilings: the rates that the roofline is made of.
        about: the machine and the versions.
        missing: peers that were not measured, and why.
        compared: beside an earlier run, if there was one.
    """
    data = {
        "rows": rows,
        "copy": ceilings.copy.median,
        "matmul": {dtype: rate.median for dtype, rate in ceilings.matmul.items()},
        "about": about,
        "missing": missing,
        "compared": compared and said(compared).splitlines(),
    }
    return with_data(TEMPLATE, data)
