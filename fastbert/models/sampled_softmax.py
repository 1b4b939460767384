"""A softmax over a sample of the vocabulary, for training: the true word against N words drawn by their frequency.

    loss = -log softmax([x . w_y + b_y - log E_y, x . w_s + b_s - log E_s for the sampled s])_y

E is how often a word is expected in the sample: words are drawn without replacement, from P(k) = log((k + 2) / (k + 1))
/ log(V + 1) for the word of rank k by frequency, until there are N, which took `tries` draws: E = 1 - (1 - P)^tries. A
sampled word that is the true one is left out. That is TensorFlow's `sampled_softmax_loss` with its log-uniform sampler,
where both directions of a language model share one sample. Source: Jean, Cho, Memisevic and Bengio, "On using very
large target vocabulary for neural machine translation" (2015).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.models.inputs import IGNORED
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.linear import linear


class LogUniform(NamedTuple):
    """What words are drawn from.

    Attributes:
        by_rank: int64 [V], the ids, the most frequent first.
        ranks: int64 [V], of each id; the inverse.
        count: N, words of a sample; at most half of V, beyond which the whole softmax takes no longer.
    """

    by_rank: Tensor
    ranks: Tensor
    count: int

    @classmethod
    def of(cls, counts: Tensor, count: int) -> "LogUniform":
        """By occurrences of each id, [V], ties by id; ValueError for more than half of the vocabulary."""
        if not 1 <= count <= len(counts) // 2:
            raise ValueError(
                f"sampled must be from 1 to half of the vocabulary of {len(counts)}, beyond which the whole softmax "
                f"takes no longer, got {count}: leave it out"
            )
        by_rank = counts.argsort(descending=True, stable=True)
        return cls(by_rank, by_rank.argsort(), count)

    def draw(self) -> tuple[Tensor, int]:
        """Ids, int64 [N], each once, and how many draws it took; by torch's generator of the CPU."""
        words, drawn = len(self.ranks), torch.empty(0, dtype=torch.int64)
        while True:
            u = torch.rand(4 * self.count, dtype=torch.float64)
            # P(rank <= k) = log(k + 2) / log(V + 1): its inverse, rounded down
            drawn = torch.cat([drawn, ((u * math.log(words + 1)).exp().long() - 1).clamp(0, words - 1)])
            found = first_places(drawn)
            if len(found) >= self.count:
                return self.by_rank[drawn[found[: self.count]]], int(found[self.count - 1]) + 1

    def log_expected(self, ids: Tensor, tries: int) -> Tensor:
        """Log E of words, as float64."""
        rank = self.ranks[ids].double()
        probability = torch.log1p(1 / (rank + 1)) / math.log(len(self.ranks) + 1)
        return torch.log(-torch.expm1(tries * torch.log1p(-probability)))


def first_places(x: Tensor) -> Tensor:
    """Where each different number of x stands first, ascending."""
    order = x.argsort(stable=True)
    ordered = x[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new].sort().values


def sampled_softmax_loss(
    hidden: list[Tensor], labels: Tensor, weight: Tensor, bias: Tensor, sampling: LogUniform
) -> Tensor:
    """The mean loss of each of several hidden states [M, W] that predict the same labels; float32 [len(hidden)].

    weight [V, W] and bias [V] get sparse gradients, of the rows of the labels and the sample, so that LazyAdam moves
    these alone. Labels of -100 are ignored.
    """
    sampled, tries = sampling.draw()
    counted = labels != IGNORED
    true = torch.where(counted, labels, sampled[0])
    rows = torch.cat([true, sampled])
    w, b = (_SparseRows.apply(table, rows) for table in (weight, bias))
    b = b - sampling.log_expected(rows, tries).to(b.dtype)
    split = [len(true), len(sampled)]
    (w_true, w_sampled), (b_true, b_sampled) = w.split(split), b.split(split)
    is_true = true.unsqueeze(1) == sampled
    target = torch.where(counted, 0, IGNORED)
    losses = []
    for x in hidden:
        right = (x.float() * w_true).sum(1) + b_true
        others = linear(x, w_sampled, b_sampled).float().masked_fill(is_true, -torch.inf)
        losses.append(cross_entropy(torch.cat([right.unsqueeze(1), others], 1), target, IGNORED))
    return torch.stack(losses)


class _SparseRows(torch.autograd.Function):
    """table[ids] with a sparse gradient, for a table of one axis too, which `F.embedding` does not take."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table.index_select(0, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx):
        (ids,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(ids.unsqueeze(0), dx, ctx.shape, check_invariants=False), None
