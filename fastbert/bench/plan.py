"""Which shapes of each op are measured, on a CPU, on a GPU and with --quick."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch

from fastbert.backends.linear import bfloat16_products
from fastbert.bench import peers, problems, products, step, tables
from fastbert.bench.measure import Case, cases
from fastbert.bench.problem import DTYPES, Problem, Verdict
from fastbert.bench.settings import BenchConfig

LENGTH, VOCABULARY, ROWS = "sequence length", "vocabulary", "rows of the table"  # what sweeps go over
# By the kind of run. gelu, rows, cross_entropy, linear: [M, N], and [M, K] to N; attention: sequences, the longest,
# dropout, whether lengths differ; tables: rows, columns, tokens; step: a preset, sequences, the longest. Sweeps: tokens
# in all and lengths; labels and vocabularies; columns, tokens and rows of a table.
SHAPES = {
    "quick": {
        "gelu": (256, 3072), "rows": (1024, 768), "cross_entropy": (32, 30522), "attention": [(8, 128, 0.1, True)],
        "linear": [(128, 768, 3072)], "tables": [(30522, 64, 2048)], "step": ("tiny", 4, 64),
        "lengths": (512, [64, 128, 256, 512]), "vocabularies": (32, [1000, 4000, 16000]),
        "rows of tables": (32, 2048, [10_000, 30_000, 100_000]),
    },
    "cpu": {
        "gelu": (2048, 3072), "rows": (4096, 768), "cross_entropy": (320, 30522),
        "attention": [(16, 128, 0.1, True), (16, 128, 0.0, False), (2, 512, 0.0, False), (4, 512, 0.1, True)],
        "linear": [(512, 768, 3072), (77, 768, 30522)], "tables": [(30522, 768, 4096), (1_000_000, 128, 65536)],
        "step": ("small", 8, 128), "lengths": (2048, [64, 128, 256, 512, 1024]),
        "vocabularies": (320, [1000, 4000, 16000, 64000]),
        "rows of tables": (32, 4096, [30_000, 100_000, 300_000, 1_000_000, 3_000_000]),
    },
    "cuda": {
        "gelu": (5120, 3072), "rows": (65536, 768), "cross_entropy": (768, 30522),
        "attention": [(64, 128, 0.1, True), (64, 128, 0.0, False), (16, 512, 0.1, False)],
        "linear": [(5120, 768, 3072), (768, 768, 30522)], "tables": [(1_000_000, 128, 65536), (10_000_000, 32, 4096)],
        "step": ("base", 64, 128), "lengths": (8192, [64, 128, 256, 512, 1024, 2048]),
        "vocabularies": (768, [1000, 4000, 16000, 64000, 256000]),
        "rows of tables": (32, 4096, [30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]),
    },
}  # fmt: skip


NARROW = "bfloat16", "float16"
Plan = list[tuple[str, Callable[[], list[Case]]]]


def plan(config: BenchConfig, among: Collection[str], missing: dict[str, str]) -> Plan:
    """What is to be measured, in order: the op's name, and what makes its cases, with their inputs, when it is called.

    Args:
        config: which ops and dtypes.
        among: names of the peers that are here.
        missing: gets a line for each peer that turns out not to run.

    Raises:
        ValueError: that is nothing.
    """
    shapes = SHAPES["quick" if config.quick else config.device]
    slow = NARROW if without_slow_products(config) else ()
    ways = [
        (op, partial(_alone, make, peers.COMPILED in among, missing, {}))
        for name in config.dtype
        for op, make in _problems(shapes, DTYPES[name], among)
        if op != "linear" or name not in slow
    ]
    ways += [
        (op, partial(_swept, make, axis, at, missing, {}))
        for name in (config.dtype[:1] if config.quick else config.dtype)
        for op, make, axis, at in _sweeps(shapes, DTYPES[name], among)
    ]
    ways += [("lazy_adam", partial(tables.cases, *table, among)) for table in shapes["tables"]]
    width, tokens, rows = shapes["rows of tables"]
    ways += [("lazy_adam", partial(tables.cases, many, width, tokens, among, ROWS)) for many in rows]
    for name in config.dtype:
        if name not in slow:
            ways.append(("step", partial(step.cases, *shapes["step"], name, config.device, among, missing)))
    ways = [(op, make) for op, make in ways if not config.only or op in config.only]
    if not ways:
        raise ValueError(
            "nothing is left to measure: --quick leaves out linear layers and steps in 16 bits on a processor that has "
            "no products for them; pass --dtype float32, or leave --quick out"
        )
    return ways


def without_slow_products(config: BenchConfig) -> bool:
    """Whether a run is short and PyTorch's 16-bit products are loops that take minutes: then they are left out."""
    narrow = any(name in NARROW for name in config.dtype)
    return config.quick and narrow and config.device == "cpu" and not bfloat16_products


def _problems(shapes: dict, dtype: torch.dtype, among: Collection[str]) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for approximate in ("none", "tanh"):
        for biased in (True, False):
            yield "gelu", partial(problems.gelu, *shapes["gelu"], dtype, approximate, biased)
    rows, columns = shapes["rows"]
    yield "layer_norm", partial(problems.layer_norm, rows // 2, columns, dtype, among)
    yield "layer_norm", partial(problems.dropout_add_layer_norm, rows, columns, dtype)
    yield "embedding_norm", partial(problems.embedding_norm, rows, columns, dtype)
    yield "dropout", partial(problems.dropout, rows, columns, dtype)
    yield "cross_entropy", partial(problems.cross_entropy, *shapes["cross_entropy"], dtype, among)
    for batch, longest, dropout, ragged in shapes["attention"]:
        lengths = products.lengths_of(batch, longest, ragged)
        yield "attention", partial(products.attention, lengths, dropout, dtype, among)
    for layer in shapes["linear"]:
        yield "linear", partial(products.linear, *layer, dtype)


def _sweeps(
    shapes: dict, dtype: torch.dtype, among: Collection[str]
) -> Iterator[tuple[str, Callable[[], Problem], str, int]]:
    tokens, lengths = shapes["lengths"]
    for length in lengths:
        many = [length] * (tokens // length)
        yield "attention", partial(products.attention, many, 0.0, dtype, among), LENGTH, length
    rows, vocabularies = shapes["vocabularies"]
    for vocabulary in vocabularies:
        yield "cross_entropy", partial(problems.cross_entropy, rows, vocabulary, dtype, among), VOCABULARY, vocabulary


def _alone(
    make: Callable[[], Problem], is_compiled: bool, missing: dict[str, str], judged: dict[str, Verdict]
) -> list[Case]:
    return cases(make(), is_compiled, missing, judged)


def _swept(
    make: Callable[[], Problem], axis: str, at: int, missing: dict[str, str], judged: dict[str, Verdict]
) -> list[Case]:
    """Forward and backward alone, without torch.compile, which would compile for every place of the sweep."""
    return cases(dataclasses.replace(make(), axis=axis, at=at), False, missing, judged)[1:]
