#!/usr/bin/env bash
# On a CPU dropout makes attention several times slower, and takes itself several times as long as a LayerNorm.
#
# Guess: dropout is a multiplication by a mask, noise beside the matrix products around it.
# Seen, torch 2.13.0, two threads: scaled_dot_product_attention with dropout_p=0.1 takes 6 to 12 times as long as
# without, because it leaves the fused path and draws one random number after another on one thread; F.dropout of
# 4,096 x 768 takes 7 to 15 times as long as F.layer_norm of the same.
# So: on a CPU, fine-tune and pretrain small models without dropout, or draw it inside the kernel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import statistics
import time

import torch
from torch.nn import functional as F

torch.set_num_threads(2)
q, x = torch.randn(16, 12, 128, 64), torch.randn(4096, 768)


def ratio(one, other):
    seconds = {one: [], other: []}
    for round_ in range(9):
        for call in (one, other):
            start = time.perf_counter()
            call()
            if round_ > 1:
                seconds[call].append(time.perf_counter() - start)
    return statistics.median(seconds[one]) / statistics.median(seconds[other])


attend = F.scaled_dot_product_attention
attention = ratio(lambda: attend(q, q, q, dropout_p=0.1), lambda: attend(q, q, q))
dropout = ratio(lambda: F.dropout(x, 0.1), lambda: F.layer_norm(x, (768,)))
print(f"attention with dropout over without: {attention:.1f}; dropout over LayerNorm: {dropout:.1f}")
assert attention > 3 and dropout > 2, "changed"
PYTHON
