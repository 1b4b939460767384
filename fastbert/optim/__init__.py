"""LazyAdam, and what belongs beside an optimizer: clipping, and the exchange of gradients between processes."""

from fastbert.optim.exchange import SummedGradients, all_gather_ids, all_gather_rows, sum_rows
from fastbert.optim.gradients import clip_grad_norm_
from fastbert.optim.lazy_adam import LazyAdam

__all__ = ["LazyAdam", "SummedGradients", "all_gather_ids", "all_gather_rows", "clip_grad_norm_", "sum_rows"]
