"""From a problem to rows of results: judged against float64 first, then timed, all variants in turn."""

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


def cases(problem: Problem, is_compiled: bool, missing: dict[str, str]) -> list[Case]:
    """A problem's two passes, ours judged first.

    Args:
        problem: what to measure.
        is_compiled: whether torch.compile takes part.
        missing: gets a line for each peer that raises here, which then is left out.

    Raises:
        VerificationError: our results are wrong.
    """
    judge = Judge(problem)
    verdicts = {OURS: judge.ours()}
    variants = {OURS: problem.ours, TORCH: problem.torch, **problem.peers}
    if is_compiled:
        torch.compiler.reset()
        theirs = problem.torch
        compiled = torch.compile(theirs.function, dynamic=False)
        variants[peers.COMPILED] = Variant(compiled, theirs.inputs, theirs.dy)
    for name in list(variants)[1:]:
        try:
            verdicts[name] = judge.another(variants[name])
            if name != TORCH:
                variants[name].call(PASSES[1])()
        except Exception as error:  # a peer of another version is no reason to measure nothing
            if name == TORCH:
                raise
            missing[f"{name}, {problem.op} {problem.shape} {name_of(problem.dtype)}"] = peers.first_line(error)
            del variants[name]
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
            verdicts=verdicts,
            product=problem.product,
            axis=problem.axis,
            at=problem.at,
        )
        for direction, size, flops in zip(PASSES, problem.sizes, problem.flops, strict=True)
    ]


def measure(case: Case, repeats: int, limit: float, ceilings: rates.Rates) -> list[Row]:
    """Times a case on torch's default device: one row a variant, and one for a copy of the bytes.

    Args:
        case: what to time.
        repeats: rounds.
        limit: seconds after which there are no more of them on a CPU, as `timing.rounds` takes it.
        ceilings: the rates that results are shares of.
    """
    variants = dict(case.variants)
    if case.size and not case.product:
        variants[COPY] = lambda _: rates.copy(case.size)
    launched, on_gpu = set(), torch.get_default_device().type == "cuda"
    if on_gpu:
        count = int(min(64, max(2, ROTATED // case.size + 1))) if case.size and not case.before else 1
        seconds, launched = gpu_timing.rounds(variants, count, repeats, case.waits)
    else:
        before = case.before and {COPY: lambda: None, **case.before}
        calls = {name: make(0) for name, make in variants.items()}
        seconds = timing.rounds(calls, repeats, before=before, limit=limit)
    compared = timing.ratios(seconds, case.reference) if case.reference else {}
    copied = timing.ratios(seconds, COPY) if COPY in seconds else {}
    peak = ceilings.matmul.get(case.dtype) if case.product else None
    return [
        _row(case, name, Stats.of(its), compared.get(name), copied.get(name), peak)
        | {"timed": "call" if not on_gpu else "launched" if name in launched else "graph"}
        for name, its in seconds.items()
    ]


def _row(case: Case, name: str, taken: Stats, ratio: Stats | None, of_copy: Stats | None, peak: Stats | None) -> Row:
    verdict = case.verdicts.get(name, Verdict())
    counted = case.flops if name != COPY else 0
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
        "bytes": case.size or None,
        "flops": counted or None,
        "gb_per_s": _round(case.size / taken.median / 1e9) if case.size else None,
        "share_of_copy": of_copy and _round(of_copy.median),
        "tflop_per_s": _round(counted / taken.median / 1e12) if counted else None,
        "share_of_matmul": _round(counted / taken.median / peak.median) if peak else None,
        "error": verdict.error and float(f"{verdict.error:.2e}"),
        "verified": "" if verdict.error is None else "no" if verdict.wrong else "yes",
        "axis": case.axis,
        "at": case.at or None,
    }


def _round(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")
