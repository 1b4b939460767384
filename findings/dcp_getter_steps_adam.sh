#!/usr/bin/env bash
# Reading the state dict of an Adam that has not stepped changes the training that follows.
#
#   findings/dcp_getter_steps_adam.sh        # needs python3 and a package index; works in a folder that it removes
#
# torch 2.13.0. `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` has an optimizer without state make it:
# `_init_optim_state` sets gradients of zero and a learning rate of 0 and calls `optimizer.step()`. No weight moves, but
# Adam counts the step. At the first update of training t is then 2 instead of 1, and both bias corrections are wrong.
# Frameworks call the getter before the first step as a matter of course, to have a template to load into.
# Reported as https://github.com/pytorch/pytorch/issues/164929.
#
# Guess before the run: without weight decay and with eps negligible, the first update is lr * m_hat / sqrt(v_hat), of a
# gradient g
#
#   t = 1    lr * g / |g|                                                                          = 1.0000 lr
#   t = 2    lr * (0.1 g / (1 - 0.9^2)) / sqrt(0.001 g^2 / (1 - 0.999^2)) = lr * 0.52632 / 0.70728 = 0.7441 lr
#
# Seen:
#
#   torch 2.13.0
#   Adam   first update: 1.0000 lr, after get_optimizer_state_dict 0.7441 lr, step 1 and 2
#   AdamW  first update: 1.0000 lr, after get_optimizer_state_dict 0.7441 lr, step 1 and 2
#
# Fails where that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

LR = 0.5


def first_update(make, reads_state):
    """In learning rates, and what the optimizer then counts. The weight starts at 1, its gradient is 1."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = make(model.parameters(), lr=LR, weight_decay=0.0)
    if reads_state:
        get_optimizer_state_dict(model, optimizer)
        assert model.weight.item() == 1 and optimizer.param_groups[0]["lr"] == LR and model.weight.grad is None
    model(torch.ones(1)).sum().backward()
    optimizer.step()
    return (1 - model.weight.item()) / LR, int(optimizer.state[model.weight]["step"])


print("torch", torch.__version__.partition("+")[0])
for make in (torch.optim.Adam, torch.optim.AdamW):
    (plain, count), (after, later) = first_update(make, False), first_update(make, True)
    print(
        f"{make.__name__:<6} first update: {plain:.4f} lr, after get_optimizer_state_dict {after:.4f} lr, "
        f"step {count} and {later}"
    )
    assert abs(plain - 1) < 1e-4 and abs(after - 0.7441) < 1e-4 and (count, later) == (1, 2), "this has changed"
PYTHON
