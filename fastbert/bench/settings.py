"""Settings of `fastbert bench`."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from fastbert.pretrain.settings import expect

Op = Literal[
    "gelu", "layer_norm", "embedding_norm", "dropout", "cross_entropy", "attention", "linear", "lazy_adam", "step"
]  # fmt: skip

SITTINGS = 5


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of `fastbert bench`; its --help shows them."""

    output: Path = Path("bench")
    """The folder to write bench.csv and bench.html into; those of an earlier run are replaced."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure."""
    only: tuple[Op, ...] = ()
    """The ops to measure; all, and a training step ("step"), if not given."""
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """The dtypes to measure in; tables of embeddings are float32 always."""
    repeats: int | None = None
    """Timed calls of every variant, in five sittings; 20 if not given, 40 with --quick. What is slow is called less."""
    quick: bool = False
    """Smaller shapes, sweeps in the first dtype alone and no torch.compile: a minute."""
    compile: bool = True
    """Measure torch.compile too, which takes seconds to compile for every case."""
    compare: Path | None = None
    """The bench.csv of an earlier run: says which ratios differ by more than the noise of both."""

    @property
    def rounds(self) -> int:
        """Timed calls of every variant in a sitting."""
        return -(-(self.repeats or (40 if self.quick else 20)) // SITTINGS)

    @property
    def limit(self) -> float:
        """Seconds after which a case has no more calls in a sitting."""
        return 0.1 if self.quick else 6.0

    def check(self) -> None:
        """Raises ValueError or OSError where a setting does not hold."""
        expect(self.repeats is None or self.repeats >= 1, "repeats", "at least 1", self.repeats)
        expect(bool(self.dtype), "dtype", "one dtype at least", self.dtype)
        expect(not self.output.is_file(), "output", "a folder, not a file", str(self.output))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda and torch finds no GPU here: pass --device cpu, or install torch for CUDA")
