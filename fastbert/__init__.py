"""LazyAdam, kernels for CPU and GPU, and thin models of the BERT family: training them without wasted work."""

from fastbert import models
from fastbert.allocator import keep_memory
from fastbert.backends import backends, use_backend
from fastbert.backends.gpu import check_device_errors
from fastbert.backends.linear import use_linear
from fastbert.capture import capture
from fastbert.models import *  # noqa: F403 - every name of the models' own __all__
from fastbert.ops.attention import attention, attention_qkv
from fastbert.ops.attention_distillation import attention_distillation
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.dropout import dropout
from fastbert.ops.gelu import gelu
from fastbert.ops.hard_attention import annealed_temperature, hard_attention
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastbert.ops.linear import linear
from fastbert.optim.exchange import SummedGradients, all_gather_ids, all_gather_rows, sum_rows
from fastbert.optim.gradients import clip_grad_norm_
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.patching import patch, patched, register_attention, unpatch
from fastbert.version import __version__

__all__ = [
    "LazyAdam",
    "SummedGradients",
    "__version__",
    "all_gather_ids",
    "all_gather_rows",
    "annealed_temperature",
    "attention",
    "attention_distillation",
    "attention_qkv",
    "backends",
    "capture",
    "check_device_errors",
    "clip_grad_norm_",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "gelu",
    "hard_attention",
    "keep_memory",
    "layer_norm",
    "linear",
    "patch",
    "patched",
    "register_attention",
    "sum_rows",
    "unpatch",
    "use_backend",
    "use_linear",
]
__all__ += models.__all__
