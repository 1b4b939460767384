"""Inputs of the op tests, what torch makes of them and the truth in float64: computed once, for all backends."""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastbert
from fastbert.testing import assert_close, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*key: object) -> torch.Generator:
    """A generator of this case alone, so that its inputs depend on no other test."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def wide(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None or not x.is_floating_point() else x.double() for x in tensors]


class Problem(NamedTuple):
    """Inputs, the gradient that flows back, and outputs and gradients by torch in their dtype and in float64."""

    inputs: Sequence[Tensor | None]
    dy: Tensor
    baseline: list[Tensor]
    truth: list[Tensor]


def problem(inputs: Sequence[Tensor | None], dy: Tensor, ours: Callable, theirs: Callable | None = None) -> Problem:
    """The truth is `ours` by the reference in float64, the baseline `theirs`, or where torch has none, the twin."""
    with fastbert.use_backend("reference"):
        truth = run(ours, wide(inputs), dy.double())
        return Problem(inputs, dy, run(theirs or ours, inputs, dy), truth)


def assert_solves(function: Callable, problem: Problem, names: Sequence[str], scale: float = 1e-30) -> list[Tensor]:
    """Asserts that outputs and gradients of `function` are the truth's; returns them."""
    results = run(function, problem.inputs, problem.dy)
    for name, *each in zip(names, results, problem.baseline, problem.truth, strict=True):
        if each[0].numel():
            assert_close(*each, what=name, scale=scale)
        assert each[0].shape == each[2].shape, name
    return results


def assert_same_for_threads(function: Callable[[], Sequence[Tensor | None]], counts: Sequence[int] = (1, 2, 3)) -> None:
    """Asserts that results are the same bits for these numbers of threads; the last twice, as threads race."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (*counts, counts[-1]):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)
