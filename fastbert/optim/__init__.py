"""LazyAdam, and what belongs beside an optimizer: clipping, and the exchange of rows between processes."""

from fastbert.optim.gradients import all_gather_ids, all_gather_rows, clip_grad_norm_
from fastbert.optim.lazy_adam import LazyAdam

__all__ = ["LazyAdam", "all_gather_ids", "all_gather_rows", "clip_grad_norm_"]
