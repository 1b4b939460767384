"""Embedding tables in training: LazyAdam beside torch's optimizers and FBGEMM, on batches of ids by Zipf's law."""

import importlib
import itertools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.bench.measure import Case
from fastbert.bench.problem import Verdict, VerificationError
from fastbert.optim.lazy_adam import LazyAdam

BATCHES = 8  # in turn
LR = 1e-3
OURS, ADAGRAD = "LazyAdam", "FBGEMM Adagrad"


def _on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _lazy(params: Sequence[nn.Parameter], **options: object) -> LazyAdam:
    return LazyAdam(params, lr=torch.tensor(LR) if _on_gpu() else LR, **options)


# Label -> whether the gradient is sparse, and the constructor.
OPTIMIZERS: dict[str, tuple[bool, Callable[..., torch.optim.Optimizer]]] = {
    "SparseAdam": (True, lambda p: torch.optim.SparseAdam(p, lr=LR)),
    "AdamW fused": (False, lambda p: torch.optim.AdamW(p, lr=LR, fused=True, capturable=_on_gpu())),
    OURS: (True, _lazy),
}


def zipf_batches(vocabulary: int, tokens: int) -> list[Tensor]:
    """Batches of ids whose frequency falls as 1 / rank, the ranks scattered over the table."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    edges, places = weights.cumsum(0) / weights.sum(), torch.randperm(vocabulary)
    drawn = [torch.searchsorted(edges, torch.rand(tokens, dtype=torch.float64)) for _ in range(BATCHES)]
    return [places[ranks.clamp(max=vocabulary - 1)] for ranks in drawn]


class Training:
    """One table with its optimizer; each call is a step of training on the next batch."""

    def __init__(self, table: nn.Module, batches: Sequence[Tensor], target: Tensor) -> None:
        self.table, self.target = table, target
        self.batches = itertools.cycle(batches)
        self.optimizer: torch.optim.Optimizer | None = None  # None: backward has it

    def read(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def backward(self) -> None:
        self.table.zero_grad()
        # Loss weights that differ by token: gradient rows of one id are not equal.
        (self.read(next(self.batches)) * self.target).sum().backward()

    def step(self) -> None:
        self.optimizer.step()

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.step()


class Fbgemm(Training):
    """FBGEMM's table on a CPU, whose backward has row-wise Adagrad in it: its backend there has no Adam."""

    def __init__(self, vocabulary: int, width: int, batches: Sequence[Tensor], target: Tensor) -> None:
        configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
        common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        ops = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
        table = ops.SplitTableBatchedEmbeddingBagsCodegen(
            [(vocabulary, width, common.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)],
            optimizer=configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            pooling_mode=common.PoolingMode.NONE,
        )
        super().__init__(table, batches, target)

    def read(self, ids: Tensor) -> Tensor:
        return self.table(ids, torch.arange(ids.numel() + 1))


def trainings(vocabulary: int, width: int, batches: Sequence[Tensor]) -> dict[str, Training]:
    """By the labels of OPTIMIZERS, each with a table of its own."""
    target, made = torch.randn(len(batches[0]), width), {}
    for label, (sparse, make) in OPTIMIZERS.items():
        table = nn.Embedding(vocabulary, width, sparse=sparse, _weight=torch.full((vocabulary, width), 0.01))
        made[label] = Training(table, batches, target)
        made[label].optimizer = make(table.parameters())
    return made


def touched_bytes(width: int, batches: Sequence[Tensor]) -> int:
    """What a step must move at least: R touched rows of weight and two moments in and out, and n gradient rows in."""
    touched = sum(ids.unique().numel() for ids in batches) // len(batches)
    return (24 * touched + 4 * batches[0].numel()) * width


def verify(vocabulary: int, width: int, ids: Tensor) -> float:
    """One step of LazyAdam against AdamW in float64 on the touched rows alone; the others must keep their bits.

    Returns:
        The mean distance, per unit of the learning rate.

    Raises:
        VerificationError: they differ, or a row that was not touched changed.
    """
    table = nn.Embedding(vocabulary, width, sparse=True)
    before = table.weight.detach().clone()
    touched, place = ids.unique(return_inverse=True)
    truth = before[touched].double().requires_grad_()
    target = torch.randn(ids.numel(), width)
    (table(ids) * target).sum().backward()
    (truth[place] * target.double()).sum().backward()
    _lazy(table.parameters(), weight_decay=0.1).step()
    torch.optim.AdamW([truth], lr=LR, weight_decay=0.1).step()
    after = table.weight.detach()
    # The first step is lr * g / (|g| + eps): where a sum of duplicates nearly cancels it depends on its last bits.
    off = (after[touched].double() - truth.detach()).abs()
    if not (off.mean() < 1e-6 and off.max() < 2 * LR):
        raise VerificationError(f"lazy_adam, {vocabulary} x {width}: LazyAdam is off by {off.max():.1e}")
    after[touched] = before[touched]
    if not torch.equal(after, before):
        raise VerificationError(f"lazy_adam, {vocabulary} x {width}: rows that were not touched changed")
    return (off.mean() / LR).item()


def cases(vocabulary: int, width: int, tokens: int, among: Collection[str], axis: str = "") -> list[Case]:
    """`step()` alone, and forward, backward and step; on a sweep `step()` alone.

    On a GPU a step works on one gradient again and again: what it touches may lie in the L2 cache where that is small.
    """
    batches = zipf_batches(vocabulary, tokens)
    verdicts = {"fastbert": Verdict(verify(vocabulary, width, batches[0]))}
    made = trainings(vocabulary, width, batches)
    made = {"fastbert": made.pop(OURS), **made}
    for training in made.values():
        training.backward()
    named = {
        "op": "lazy_adam", "shape": f"{vocabulary} x {width}, {tokens} tokens", "dtype": "float32",
        "reference": "SparseAdam", "verdicts": verdicts, "waits": ("SparseAdam",), "axis": axis,
        "at": vocabulary if axis else 0,
    }  # fmt: skip
    alone = Case(
        direction="step",
        variants={label: lambda _, training=training: training.step for label, training in made.items()},
        before={label: training.backward for label, training in made.items()},
        size=touched_bytes(width, batches),
        flops=12 * touched_bytes(width, batches) // 24,
        **named,
    )
    if axis:
        return [alone]
    if peers.FBGEMM in among:
        made[ADAGRAD] = Fbgemm(vocabulary, width, batches, torch.randn(tokens, width))
    whole = {label: lambda _, training=training: training for label, training in made.items()}
    return [alone, Case(direction="forward+backward+step", variants=whole, **named)]
