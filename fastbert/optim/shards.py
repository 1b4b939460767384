"""Parameters of which this process holds a part: FSDP2's, DTensors split by rows over the processes.

An optimizer's step is the same arithmetic for every row, so each process takes it for its own rows. A row id is the
whole table's; here it becomes one of this process's part.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_shard(x: Any) -> bool:
    """Whether it is a DTensor. Their module takes a second to import; where nobody has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_shard(param: Tensor) -> None:
    """Raises TypeError unless the DTensor `param` is split by rows along one axis of its mesh at most."""
    splits = [placement for placement in param.placements if not placement.is_replicate()]
    if len(splits) > 1 or not all(placement.is_shard(0) for placement in splits):
        raise TypeError(
            "LazyAdam takes DTensors that are whole or split by rows, as fully_shard makes them: expected placements "
            f"Shard(0) and Replicate(), got {param.placements}"
        )


def local(x: Any) -> Any:
    """The part of a DTensor that this process holds, in the same memory; anything else as it is."""
    return x.to_local() if is_shard(x) else x


def first_row(param: Tensor) -> int:
    """The row of the whole table that is row 0 of this process's part."""
    for axis, placement in enumerate(param.placements):
        if placement.is_shard(0):
            part = -(-param.shape[0] // param.device_mesh.size(axis))  # rows of all parts but the last
            return min(part * param.device_mesh.get_local_rank(axis), param.shape[0])
    return 0


def rows_here(param: Tensor, ids: Tensor) -> Tensor:
    """Those of `ids`, int64 [n], that are rows of this process's part, counted from its first; a GPU is waited for."""
    ids = ids - first_row(param)
    return ids[(ids >= 0) & (ids < len(param.to_local()))]


def spread(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """State of this process's part of `param`, with each tensor that has rows a DTensor split as `param` is."""
    if not is_shard(param):
        return state
    return {name: _as_split(x, param) if isinstance(x, Tensor) and x.dim() else x for name, x in state.items()}


def _as_split(part: Tensor, param: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*param.shape[:1], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def total_square(params: list[Tensor], norms: list[Tensor]) -> Tensor:
    """The sum of squares of all `norms`, float64 scalars: of what is split, the norms of all parts."""
    sums: dict[Any, list[Tensor]] = {}
    for param, norm in zip(params, norms, strict=True):
        split = (param.device_mesh, tuple(param.placements)) if is_shard(param) else None
        sums.setdefault(split, []).append(norm.square())
    total = torch.zeros((), dtype=torch.float64, device=norms[0].device)
    for split, squares in sums.items():
        its = torch.stack(squares).sum()
        for axis, placement in enumerate(split[1] if split else ()):
            if placement.is_shard():
                dist.all_reduce(its, group=split[0].get_group(axis))
        total = total + its
    return total
