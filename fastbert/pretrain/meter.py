"""What a run computes and how well it uses the machine: arithmetic, padding, waiting for data.

`mfu` is the model's arithmetic (`presets.operations` of the tokens, attended pairs and predictions that a batch has,
padding left out), by the time that it took, over the rate of a large matrix product on the same device, measured when
the run starts: what the machine reaches at best, rather than what its maker states. Each process measures and counts
its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastbert.data.batch import ROUNDED_TO, Batch
from fastbert.models.config import ModelConfig
from fastbert.models.inputs import IGNORED
from fastbert.ops.linear import linear
from fastbert.pretrain.presets import operations
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.step import on_gpu, products

SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices multiplied
SECONDS = 0.1  # that the measurement may take, and three products in any case


def product_rate(config: PretrainConfig) -> float:
    """Floating-point operations a second of a square product, in the run's dtype and by its library; the best one."""
    device = torch.device(config.device)
    side, dtype = SIDE[device.type], torch.bfloat16 if config.bf16 else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the run's own is part of what resumes
    x, weight = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    times: list[float] = []
    with torch.no_grad(), products(config):
        linear(x, weight)  # libraries prepare what they need
        while len(times) < 3 or sum(times) < SECONDS:
            wait_for(device)
            start = time.perf_counter()
            linear(x, weight)
            wait_for(device)
            times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work(batch: Batch, config: ModelConfig) -> float:
    """Floating-point operations of a training step on a batch on the CPU, of what is no padding."""
    lengths = batch.cu_seqlens.clamp(max=batch.filled_tokens).diff().to(torch.int64)
    pairs = int(visible_pairs(lengths, config).sum())
    predicted = int((batch.labels != IGNORED).sum())
    return operations(config, batch.filled_tokens, pairs, predicted, int((lengths > 0).sum()))


def visible_pairs(lengths: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """How many pairs of a query and a key that it sees there are in sequences of these lengths, int64 each."""
    if config.attention_window is None:
        return lengths * (lengths + 1) // 2 if config.is_decoder else lengths * lengths
    side = (lengths - 1).clamp(min=0, max=config.attention_window // 2)  # keys to one side, where there are so many
    before = lengths * side - side * (side + 1) // 2
    if config.is_decoder:
        return lengths + before
    to_first = 2 * (lengths - 1 - side).clamp(min=0) if config.attention_global_first else 0
    return lengths + 2 * before + to_first


class Meter:
    """Counts what is computed between two lines of the metrics.

    Args:
        config: of the run. model_config: of its model.

    Attributes:
        rate: as of `product_rate`.
    """

    def __init__(self, config: PretrainConfig, model_config: ModelConfig):
        self.config, self.model_config, self.rate = config, model_config, product_rate(config)
        self.rounded_to = 1 if on_gpu(config) else ROUNDED_TO  # see `evaluate.forward`
        self.start(0)

    def __str__(self) -> str:
        dtype = "bfloat16" if self.config.bf16 else "float32"
        library = "" if on_gpu(self.config) else f" by {self.config.linear}"
        return f"products in {dtype}{library}: {self.rate / 1e9:,.0f} GFLOP/s, of which mfu in the metrics is a share"

    def start(self, tokens: int) -> None:
        """Begins to count, and the clock, with so many tokens trained on by all processes."""
        self.tokens = tokens
        self.operations, self.filled, self.places, self.waited = 0.0, 0, 0, 0.0
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it the run waits for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def count(self, micro: list[Batch]) -> None:
        """Batches, on the CPU, that are computed next."""
        for batch in micro:
            tokens = len(batch.input_ids)
            self.places += tokens + -tokens % self.rounded_to
            self.filled += batch.filled_tokens
            self.operations += work(batch, self.model_config)

    def used(self, tokens: int) -> dict[str, float]:
        """Since the start: tokens a second of all processes, `tokens` by now; and of this one `padding` of the tokens
        that it computed, `waiting` for data of the time, `mfu`."""
        seconds = time.perf_counter() - self._began
        return {
            "tokens_per_second": round((tokens - self.tokens) / seconds),
            "padding": round(1 - self.filled / self.places, 4),
            "waiting": round(self.waited / seconds, 4),
            "mfu": round(self.operations / seconds / self.rate, 4),
        }
