#!/usr/bin/env bash
# GELU of negative numbers: 17 % relative error in float32, and exactly 0 in float64 where the truth is 1e-17.
#
# Guess: a smooth function of the standard library is good to a few ULP, and float64 can serve as the truth of float32
# tests.
# Seen, torch 2.13.0 on a CPU: it computes x/2 * (1 + erf(x/sqrt(2))), whose sum cancels. On [-5, -4] the float32
# result is off by more than a tenth of its value; the float64 one is exactly 0 from -8.4 on down, where x/2 *
# erfc(-x/sqrt(2)) still has all its digits. The absolute error is small, so losses do not notice; a test of a kernel
# that divides by the truth does.
# So: the truth for GELU is 0.5 * x * erfc(-x / sqrt(2)) in float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import math

import torch
from torch.nn.functional import gelu


def truth(x):
    return 0.5 * x.double() * torch.erfc(-x.double() / math.sqrt(2))


x = torch.linspace(-5, -4, 1001)
relative = ((gelu(x).double() - truth(x)) / truth(x)).abs().max().item()
far = torch.linspace(-13, -8.5, 1001, dtype=torch.float64)
print(f"float32 on [-5, -4]: relative error up to {relative:.1%}")
print(f"float64 below -8.5: {int((gelu(far) == 0).sum())} of 1001 are exactly 0,")
print(f"and the truth goes from {truth(far)[-1]:.1e} to {truth(far)[0]:.1e}")
assert relative > 0.1 and (gelu(far) == 0).all() and (truth(far) != 0).all(), "changed"
PYTHON
