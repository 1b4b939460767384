"""From a problem to rows of results: judged against float64 first, then timed, all variants in turn."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from fastbert.bench import gpu_timing, peers, rates, timing
from fastbert.bench.problem import PASSES, Judge, Problem, Variant, Verdict, name_of
from fastbert.bench.timing import Call, Stats

OURS, TORCH, COPY = "fastbert", "torch", "copy"
ROTATED = 300e6  # bytes of inputs that take turns on a GPU, several times the L2 cache
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """What is timed side by side.

    Attributes:
        op, shape, dtype, direction: what it is: three columns of the results and the pass.
        variants: make, by name, the call on copy i of the inputs.
        reference: the variant whose time ratios are taken of; "" for none.
        size, flops: bytes that must move, operations; 0 where they are not counted.
        verdicts: by variant, where there is one.
        before: by variant, what is called ahead of each call on a CPU and not timed.
        waits: the variants that wait for a GPU, which no graph can capture.
        product, axis, at: as a `Problem` has them.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    variants: Mapping[str, Callable[[int], Call]]
    reference: str = TORCH
    size: int = 0
    flops: int = 0
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    before: Mapping[str, Call] | None = None
    waits: Collection[str] = ()
    product: bool = False
    axis: str = ""
    at: int = 0


def cases(problem: Problem, is_compiled: bool, missing: dict[str, str], judged: dict[str, Verdict]) -> list[Case]:
    """A problem's two passes, ours judged first.

    Args:
        problem: what to measure.
        is_compiled: whether torch.compile takes part.
        missing: gets a line for each peer that raises here, which then is left out.
        judged: empty, and gets every variant's verdict; from another sitting those that there are, which hold.

    Raises:
        VerificationError: our results are wrong.
    """
    variants = {OURS: problem.ours, TORCH: problem.torch, **problem.peers}
    if is_compiled:
        torch.compiler.reset()  # problems share functions, of which it compiles so many variants and then no more
        theirs = problem.torch
        compiled = torch.compile(theirs.function, dynamic=False)
        variants[peers.COMPILED] = Variant(compiled, theirs.inputs, theirs.dy)
    if not judged:
        judged |= _verdicts(problem, variants, missing)
    variants = {name: variants[name] for name in judged}
    return [
        Case(
            problem.op,
            problem.shape,
            name_of(problem.dtype),
            direction,
            {
                name: lambda copy, variant=variant, direction=direction: variant.call(direction, copy)
                for name, variant in variants.items()
            },
            size=size,
            flops=flops,
            verdicts=judged,
            product=problem.product,
            axis=problem.axis,
            at=problem.at,
        )
        for direction, size, flops in zip(PASSES, problem.sizes, problem.flops, strict=True)
    ]


def _verdicts(problem: Problem, variants: Mapping[str, Variant], missing: dict[str, str]) -> dict[str, Verdict]:
    """Of the variants that run, ours first; the others get a line in `missing`."""
    judge = Judge(problem)
    verdicts = {OURS: judge.ours()}
    for name in list(variants)[1:]:
        try:
            verdict = judge.another(variants[name])
            if name != TORCH:
                variants[name].call(PASSES[1])()
        except Exception as error:  # a peer of another version is no reason to measure nothing
            if name == TORCH:
                raise
            missing[f"{name}, {problem.op} {problem.shape} {name_of(problem.dtype)}"] = peers.first_line(error)
        else:
            verdicts[name] = verdict
    return verdicts


class Taken:
    """The times of a case, of all sittings.

    A sitting makes the inputs anew and times some rounds. Sittings lie minutes apart, and what the machine does
    meanwhile, and where in memory tensors come to lie, differs between them as it does between two runs.
    """

    def __init__(self, case: Case):
        self.case = dataclasses.replace(case, variants={}, before=None)  # they hold the inputs
        self.sittings: list[dict[str, list[float]]] = []
        self.launched: set[str] = set()
        self.how = "graph" if torch.get_default_device().type == "cuda" else "call"

    def sit(self, case: Case, repeats: int, limit: float) -> None:
        """One more sitting of the case on torch's default device, with a copy of its bytes among the variants.

        Args:
            case: the same again, with variants.
            repeats: rounds.
            limit: seconds after which there are no more of them on a CPU, as `timing.rounds` takes it.
        """
        variants = dict(case.variants)
        if case.size and not case.product:
            variants[COPY] = lambda _: rates.copy(case.size)
        if self.how == "graph":
            count = int(min(64, max(2, ROTATED // case.size + 1))) if case.size and not case.before else 1
            seconds, launched = gpu_timing.rounds(variants, count, repeats, case.waits)
            self.launched |= launched
        else:
            before = case.before and {COPY: lambda: None, **case.before}
            calls = {name: make(0) for name, make in variants.items()}
            seconds = timing.rounds(calls, repeats, warmup=2, before=before, limit=limit)
        self.sittings.append(seconds)

    def rows(self, ceilings: rates.Rates) -> list[Row]:
        """One row a variant, and one for a copy of the bytes; `ceilings` are the rates that results are shares of."""
        names = dict.fromkeys(name for sitting in self.sittings for name in sitting)
        return [self._row(name, ceilings) for name in names]

    def _row(self, name: str, ceilings: rates.Rates) -> Row:
        case, verdict = self.case, self.case.verdicts.get(name, Verdict())
        taken = Stats.of([second for sitting in self.sittings for second in sitting.get(name, [])])
        ratios, copied = self._ratios(name, case.reference), self._ratios(name, COPY)
        ratio = Stats.of(list(itertools.chain(*ratios))) if ratios else None
        fastest = self._fastest(name, case.reference)
        counted = case.flops if name != COPY else 0
        peak = ceilings.matmul.get(case.dtype) if case.product else None
        return {
            "op": case.op,
            "case": case.shape,
            "pass": case.direction,
            "dtype": case.dtype,
            "variant": name,
            "p20_ms": _round(1e3 * taken.p20),
            "median_ms": _round(1e3 * taken.median),
            "p80_ms": _round(1e3 * taken.p80),
            "reference": case.reference,
            "ratio_p20": ratio and _round(ratio.p20),
            "ratio": ratio and _round(ratio.median),
            "ratio_p80": ratio and _round(ratio.p80),
            "ratio_least": _round(min(fastest)) if fastest else None,
            "ratio_fastest": _round(statistics.median(fastest)) if fastest else None,
            "ratio_most": _round(max(fastest)) if fastest else None,
            "sittings": len(fastest),
            "bytes": case.size or None,
            "flops": counted or None,
            "gb_per_s": _round(case.size / taken.median / 1e9) if case.size else None,
            "share_of_copy": _round(statistics.median(itertools.chain(*copied))) if copied else None,
            "tflop_per_s": _round(counted / taken.median / 1e12) if counted else None,
            "share_of_matmul": _round(counted / taken.median / peak.median) if peak else None,
            "error": None if verdict.error is None else float(f"{verdict.error:.2e}"),
            "verified": "no" if verdict.wrong else "" if verdict.error is None else "yes",
            "axis": case.axis,
            "at": case.at or None,
            "timed": "launched" if name in self.launched else self.how,
        }

    def _ratios(self, name: str, reference: str) -> list[list[float]]:
        """The reference's time over a variant's, by sitting and round; of the sittings that have both."""
        return [timing.ratios(sitting, reference)[name] for sitting in self._with(name, reference)]

    def _fastest(self, name: str, reference: str) -> list[float]:
        """Of every sitting the reference's fastest call over the variant's, which other programs disturb least."""
        return [min(sitting[reference]) / min(sitting[name]) for sitting in self._with(name, reference)]

    def _with(self, *names: str) -> list[dict[str, list[float]]]:
        return [sitting for sitting in self.sittings if all(name in sitting for name in names)]


def _round(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")
