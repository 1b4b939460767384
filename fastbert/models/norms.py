"""Norms in LayerNorm's place behind attention and behind the feed-forward network: batch, instance, group, switchable.

All are `weight * (z - mean) / sqrt(variance + 1e-5) + bias` of `z = residual + dropout(x)`, [T, H], with variances over
n, not n - 1. They differ in what a mean and a variance are taken over:

- batch: a feature's, over all tokens of the batch; in evaluation, running means of these. Ioffe and Szegedy, "Batch
  normalization" (2015).
- instance: a feature's, over the tokens of its sequence. Ulyanov, Vedaldi and Lempitsky, "Instance normalization"
  (2016).
- group: a token's, over each of `norm_groups` groups of neighbouring features. Wu and He, "Group normalization" (2018),
  take an image's places together; in a transformer LayerNorm takes each token for itself, and so does this: one group
  is LayerNorm.
- switchable: a mix of instance, layer (a token's, over all features) and batch, by two softmaxes of three learned
  weights, one for means and one for variances. Luo, Ren, Peng, Zhang and Li, "Differentiable learning-to-normalize via
  switchable normalization" (2018).

Statistics are float32 (float64 of float64), and over real tokens alone: sequences are packed, and where a batch is
filled up with padding, that is left out. It is all torch's operations; `torch.nn.functional` has batch and group norm,
and for sequences of different lengths no instance norm.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert.models.config import ModelConfig
from fastbert.models.layers import Dropout, Linear

EPS = 1e-5  # torch's, and the papers'; BERT's 1e-12 is too small for a feature that hardly varies
MOMENTUM = 0.1  # share of the newest batch in running statistics, as torch has it


class Tokens(NamedTuple):
    """Which packed tokens have statistics together.

    Attributes:
        sequence: int64 [T], the number of each token's sequence.
        cu_seqlens: int32 [B + 1], where each sequence starts, and T.
        real: bool [T, 1], False at padding; None where there is none.
    """

    sequence: Tensor
    cu_seqlens: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, ids: Tensor, cu_seqlens: Tensor, pad_id: int) -> Self:
        """Of packed ids [T]. On a GPU, and within torch.compile, padding is reckoned with, as nothing is looked at."""
        order = torch.arange(len(ids), dtype=cu_seqlens.dtype, device=ids.device)
        sequence = torch.searchsorted(cu_seqlens.contiguous(), order, right=True) - 1
        real = ids.unsqueeze(1) != pad_id
        looked_at = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        return cls(sequence, cu_seqlens, None if looked_at and bool(real.all()) else real)

    def mean(self, x: Tensor) -> Tensor:
        """x [T, H] -> [B, H], over each sequence; 0 for one without tokens."""
        lengths = self.cu_seqlens.diff().clamp(min=1).unsqueeze(1)
        return _Sum.apply(x, self) / lengths

    def spread(self, x: Tensor) -> Tensor:
        """x [B, H] -> [T, H], to each token its sequence's."""
        return _Spread.apply(x, self)

    def mean_of_all(self, x: Tensor) -> Tensor:
        """x [T, H] -> [H], over real tokens."""
        if self.real is None:
            return x.mean(0)
        return torch.where(self.real, x, 0.0).sum(0) / self.count(x).clamp(min=1)

    def count(self, x: Tensor) -> Tensor:
        """How many of x [T, H] are real."""
        return x.new_tensor(len(x)) if self.real is None else self.real.sum()


class _Sum(torch.autograd.Function):
    """x [T, H] -> [B, H], summed by sequence, always in the same order, which `index_add` on a GPU is not."""

    @staticmethod
    def forward(ctx, x, tokens):
        ctx.tokens = tokens
        return torch.segment_reduce(x.contiguous(), "sum", offsets=tokens.cu_seqlens, axis=0, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx, dy):
        return _Spread.apply(dy, ctx.tokens), None


class _Spread(torch.autograd.Function):
    """The transpose of `_Sum`."""

    @staticmethod
    def forward(ctx, x, tokens):
        ctx.tokens = tokens
        return x.index_select(0, tokens.sequence)

    @staticmethod
    def backward(ctx, dy):
        return _Sum.apply(dy, ctx.tokens), None


class AddNorm(nn.Module):
    """`norm(residual + dropout(x))` for two uses of the result; dropout in training mode only.

    Shapes: x [T, H], residual [T, H] -> [T, H] in x's dtype, twice, as `DropoutAddLayerNorm.twice` gives it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, x: Tensor, residual: Tensor, seed: Tensor | None = None, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        z = residual.to(x.dtype) + self.dropout(x, seed)
        y = self.normalize(z if z.dtype == torch.float64 else z.float(), tokens).to(z.dtype)
        return y, y

    def normalize(self, z: Tensor, tokens: Tokens | None) -> Tensor:
        """z [T, H] -> [T, H], float32 or float64; `tokens` are given where `REACHES_OTHERS` has the norm."""
        raise NotImplementedError

    def affine(self, centred: Tensor, variance: Tensor) -> Tensor:
        return centred * torch.rsqrt(variance + EPS) * self.weight + self.bias


class AddGroupNorm(AddNorm):
    """Group norm of each token."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.groups = config.norm_groups

    def normalize(self, z: Tensor, tokens: Tokens | None) -> Tensor:
        return F.group_norm(z, self.groups, self.weight.to(z.dtype), self.bias.to(z.dtype), EPS)


class AddInstanceNorm(AddNorm):
    """Instance norm: a sequence's own statistics, in evaluation too."""

    def normalize(self, z: Tensor, tokens: Tokens | None) -> Tensor:
        centred, variance = _of_sequences(z, tokens)
        return self.affine(centred, tokens.spread(variance))


def _of_sequences(z: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """z [T, H] less its sequence's mean, and each sequence's variance [B, H]."""
    centred = z - tokens.spread(tokens.mean(z))
    return centred, tokens.mean(centred.square())


class _WithRunning(AddNorm):
    """What has the batch's statistics, and keeps running ones for evaluation; the variance there is over n - 1."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.register_buffer("running_mean", torch.zeros(config.hidden_size))
        self.register_buffer("running_variance", torch.ones(config.hidden_size))

    def batch(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Mean and variance of each feature, [H]: in training the batch's, which then count among the running ones."""
        if not self.training:
            return self.running_mean.to(z.dtype), self.running_variance.to(z.dtype)
        mean = tokens.mean_of_all(z)
        variance = tokens.mean_of_all((z - mean).square())
        with torch.no_grad():
            count = tokens.count(z)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
            self.running_variance.lerp_(unbiased.to(self.running_variance.dtype), MOMENTUM)
        return mean, variance


class AddBatchNorm(_WithRunning):
    """Batch norm."""

    def normalize(self, z: Tensor, tokens: Tokens | None) -> Tensor:
        if self.training and tokens.real is not None:
            mean, variance = self.batch(z, tokens)
            return self.affine(z - mean, variance)
        running = self.running_mean.to(z.dtype), self.running_variance.to(z.dtype)  # themselves, but of 16 bits
        y = F.batch_norm(z, *running, self.weight.to(z.dtype), self.bias.to(z.dtype), self.training, MOMENTUM, EPS)
        if self.running_mean.dtype != z.dtype:
            self.running_mean.copy_(running[0])
            self.running_variance.copy_(running[1])
        return y


class AddSwitchableNorm(_WithRunning):
    """Switchable norm. Its two weights, [3], are those of instance, layer and batch before the softmax."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.variance_weight = nn.Parameter(torch.ones(3))

    def normalize(self, z: Tensor, tokens: Tokens | None) -> Tensor:
        instance_centred, instance_variance = _of_sequences(z, tokens)
        layer_variance, layer_mean = torch.var_mean(z, 1, correction=0, keepdim=True)
        batch_mean, batch_variance = self.batch(z, tokens)
        of_means, of_variances = (w.to(z.dtype).softmax(0) for w in (self.mean_weight, self.variance_weight))
        # The weights sum to 1: z less the mixed mean is the mix of z less each.
        centred = of_means[0] * instance_centred + of_means[1] * (z - layer_mean) + of_means[2] * (z - batch_mean)
        variance = of_variances[0] * tokens.spread(instance_variance) + of_variances[1] * layer_variance
        return self.affine(centred, variance + of_variances[2] * batch_variance)


NORMS = {
    "batch": AddBatchNorm, "instance": AddInstanceNorm, "group": AddGroupNorm, "switchable": AddSwitchableNorm,
}  # fmt: skip


class DenseAddNorm(nn.Module):
    """How both halves of a layer end where their norm is not LayerNorm: dense, dropout, residual, norm.

    Shapes: x [T, in_features], residual [T, H] -> [T, H] twice.
    """

    def __init__(self, in_features: int, config: ModelConfig):
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.norm = NORMS[config.norm](config)

    def forward(
        self, x: Tensor, residual: Tensor, seed: Tensor | None = None, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.norm(self.dense(x), residual, seed, tokens)
