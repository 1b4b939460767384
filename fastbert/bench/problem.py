"""One op on inputs of one shape and dtype: how it is computed, what it costs at least, and whether it is right."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastbert.bench.timing import Call
from fastbert.testing import assert_close, run

Op = Callable[..., Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = "forward", "forward+backward"


@dataclass(frozen=True)
class Variant:
    """An op as somebody computes it.

    Attributes:
        function: the op, of tensors.
        inputs: these tensors; each gets a gradient.
        dy: the gradient that flows back, of the output's shape.
    """

    function: Op
    inputs: Sequence[Tensor]
    dy: Tensor

    def call(self, what: str, copy: int = 0) -> Call:
        """The pass `what` of PASSES; copy 0 works on `inputs` themselves, each other one on tensors of its own."""
        inputs = [x.detach() if copy == 0 else x.detach().clone() for x in self.inputs]
        return forward(self.function, inputs) if what == PASSES[0] else forward_backward(self.function, inputs, self.dy)


def forward(op: Op, inputs: Sequence[Tensor]) -> Call:
    """Forward alone, as in inference."""

    def call() -> Tensor:
        with torch.no_grad():
            return op(*inputs)

    return call


def forward_backward(op: Op, inputs: Sequence[Tensor], dy: Tensor) -> Call:
    """Forward, and backward to every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(op(*leaves), leaves, dy)


class VerificationError(ValueError):
    """A result is further from float64 than the tests allow; nothing of the op is timed then."""


@dataclass(frozen=True)
class Check:
    """How a result is judged: by its distance to float64 beside that of PyTorch's own in the same dtype.

    Attributes:
        names: of the results, the output and the gradient of every input.
        ours: our op; where it drops elements, with a fixed seed.
        baseline: the same op in PyTorch, in the inputs' dtype; where elements are dropped our twin in plain PyTorch,
            which draws the same mask.
        truth: the same on float64 inputs.
        drops: whether elements are dropped: then another's results cannot be judged, for its mask is another one.
    """

    names: Sequence[str]
    ours: Op
    baseline: Op
    truth: Op
    drops: bool = False


@dataclass(frozen=True)
class Problem:
    """An op on inputs of one shape and dtype.

    Attributes:
        op, shape, dtype: what it is, in the words of the tables.
        ours, torch: the op by this package, and by PyTorch's own ops.
        check: how results are judged.
        sizes: bytes that must move in each of PASSES: every input once, every output once.
        flops: operations of each of PASSES.
        peers: other libraries' op, by name.
        product: whether the operations are those of matrix products, so that the rate of one is the ceiling.
        axis, at: what a sweep goes over, such as "sequence length", and this problem's place on it; "" and 0 outside.
    """

    op: str
    shape: str
    dtype: torch.dtype
    ours: Variant
    torch: Variant
    check: Check
    sizes: tuple[int, int]
    flops: tuple[int, int]
    peers: dict[str, Variant] = field(default_factory=dict)
    product: bool = False
    axis: str = ""
    at: int = 0


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the truth, per unit of the largest true value, and what is wrong with that, if anything.

    The largest of the output and all gradients; None where it cannot be judged, and where it is not finite.
    """

    error: float | None = None
    wrong: str | None = None


class Judge:
    """The truth of a problem, and PyTorch's own results beside it: what every variant is held against."""

    def __init__(self, problem: Problem):
        self.problem = problem
        inputs, dy, check = problem.ours.inputs, problem.ours.dy, problem.check
        self.baseline = run(check.baseline, inputs, dy)
        self.truth = run(check.truth, [x.double() for x in inputs], dy)

    def ours(self) -> Verdict:
        """The verdict on our op.

        Raises:
            VerificationError: it is wrong; the message names op, shape, dtype and result, and says how far it is off.
        """
        problem = self.problem
        verdict = self._verdict(run(problem.check.ours, problem.ours.inputs, problem.ours.dy))
        if verdict.wrong:
            what = f"{problem.op}, {problem.shape}, {name_of(problem.dtype)}"
            raise VerificationError(f"{what}: {verdict.wrong}; what is wrong is not timed")
        return verdict

    def another(self, variant: Variant) -> Verdict:
        """The verdict on another's op; none where it drops other elements, or takes its inputs in another layout."""
        if self.problem.check.drops or variant.inputs is not self.problem.ours.inputs:
            return Verdict()
        return self._verdict(run(variant.function, variant.inputs, variant.dy))

    def _verdict(self, found: Sequence[Tensor]) -> Verdict:
        results = list(zip(self.problem.check.names, found, self.baseline, self.truth, strict=True))
        error = max(((x.double() - true).abs().max() / true.abs().max()).item() for _, x, _, true in results)
        error = error if math.isfinite(error) else None  # of a result with NaN, which is wrong and has no distance
        try:
            for what, *values in results:
                assert_close(*values, what=what)
        except AssertionError as wrong:
            return Verdict(error, str(wrong))
        return Verdict(error)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
