#!/usr/bin/env bash
# FSDP2's set_gradient_divide_factor on a model changes the gradients of the root's own parameters, and of no layer's.
#
# Guess: like its neighbour set_requires_gradient_sync, which recurses by default, it reaches all modules below, so
# that model.set_gradient_divide_factor(1.0) makes every gradient the sum over processes.
# Seen, torch 2.13.0, two gloo processes: embeddings and head, which the root holds, are summed; the layers, each
# wrapped by fully_shard as the tutorial has it, are still averaged. There is no recurse argument and no warning.
# So: a loss that is already divided by the global number of tokens trains its layers with a gradient that is too small
# by the number of processes, beside a head whose gradient is right, and clipping then weighs the two wrongly. Call it on
# every FSDPModule of model.modules().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
cat > two.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def gradients(factor_on):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2))
    fully_shard(model[1])
    fully_shard(model)
    for module in (model[1], model):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for module in factor_on(model):
        module.set_gradient_divide_factor(1.0)
    model(torch.ones(4, 8)).sum().backward()  # the same on both processes
    return [parameter.grad.full_tensor().norm().item() for parameter in (model[1][0].weight, model[2].weight)]


dist.init_process_group("gloo")
usual = gradients(lambda model: [])
root = gradients(lambda model: [model])
every = gradients(lambda model: [module for module in model.modules() if isinstance(module, FSDPModule)])
ratios = [[a / b for a, b in zip(some, usual)] for some in (root, every)]
if dist.get_rank() == 0:
    for name, (layer, head) in zip(("set on the model", "set on every FSDPModule"), ratios):
        print(f"{name}: the layer's gradient is {layer:.2f} times the mean, the head's {head:.2f} times")
    assert [[round(x, 3) for x in some] for some in ratios] == [[1.0, 2.0], [2.0, 2.0]], "changed"
dist.destroy_process_group()
PYTHON
venv/bin/python -m torch.distributed.run --nproc-per-node 2 two.py 2> said || { cat said; exit 1; }
