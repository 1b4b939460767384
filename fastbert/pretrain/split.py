"""A model split over the processes by FSDP2: each keeps a part of every parameter, gradient and moment.

A layer is put together from all processes when it computes, and taken apart again. Word embeddings and heads, which
share the table, are put together for the whole pass.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fastbert.models.auto import PRETRAINING
from fastbert.models.encoder import Layer
from fastbert.models.pretraining import PreTrainingModel
from fastbert.pretrain.processes import backend
from fastbert.pretrain.settings import PretrainConfig


def split(model: PreTrainingModel, config: PretrainConfig) -> None:
    """Splits the model in place, over all processes of the default group; their gradients are added up, not averaged.

    An ALBERT's layer, which computes as often as there are layers, stays together for the whole pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # The outputs are views of wider logits, and nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(torch.device(config.device).type, (dist.get_world_size(),))
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # which gloo has, unlike a sum with a factor


def whole(model: PreTrainingModel, config: PretrainConfig) -> PreTrainingModel:
    """The model put together on the CPU; called by all processes, and good in the first one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    together = PRETRAINING[config.model](model.config)
    if tensors:
        together.load_state_dict(tensors)
    return together


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone within the block, where there is none: a split model needs one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
