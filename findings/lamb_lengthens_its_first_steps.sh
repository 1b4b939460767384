#!/usr/bin/env bash
# pytorch_optimizer's LAMB steps ten times as far as its trust ratio says, and decays weights beside it.
#
#   findings/lamb_lengthens_its_first_steps.sh        # needs python3 and a package index; works in a folder that it removes
#
# pytorch_optimizer 4.1.0, torch 2.13.0. LAMB scales the update of each matrix to the norm of the matrix, so that a step with
# learning rate lr moves it by lr * |w|. The class says that it is "version 3 of the paper without bias correction". Yet
# `Lamb.step` divides the learning rate by 1 - beta1 ** step, Adam's correction of the first moment, when the update already
# has been scaled: the first step is ten times as long, the tenth still 1.5 times. `adam_debias=True`, which is no
# argument of `Lamb` and is taken from **kwargs, leaves the correction out. Weight decay is by default applied to the weight beside
# the step; in the paper it is part of the update whose norm is taken (`weight_decouple=False`).
#
# Guess before the run, of a matrix with |w| = 1 and lr = 0.01: the first step moves it by 0.01.
#
# Seen:
#
#   pytorch_optimizer 4.1.0, torch 2.13.0
#   defaults           first step 0.1000, tenth 0.0154
#   adam_debias=True   first step 0.0100, tenth 0.0100
#
# Fails where that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pytorch_optimizer==4.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from pytorch_optimizer import Lamb


def lengths(**options):
    """How far each of ten steps moves a matrix, over its norm before; the learning rate is 0.01."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(8, 8), dim=None))
    optimizer = Lamb([weight], lr=0.01, **options)
    moved = []
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = torch.randn(8, 8)
        optimizer.step()
        moved.append(((weight - before).norm() / before.norm()).item())
    return moved


print(f"pytorch_optimizer {version('pytorch_optimizer')}, torch {torch.__version__.partition('+')[0]}")
for name, options, first, tenth in (
    ("defaults", {}, 0.1, 0.01 / (1 - 0.9**10)),
    ("adam_debias=True", {"adam_debias": True}, 0.01, 0.01),
):
    moved = lengths(**options)
    print(f"{name:<18} first step {moved[0]:.4f}, tenth {moved[9]:.4f}")
    assert abs(moved[0] - first) < 1e-4 and abs(moved[9] - tenth) < 1e-4, "this has changed"
PYTHON
