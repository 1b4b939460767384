#!/usr/bin/env bash
# On a CPU without bfloat16 instructions a linear layer's backward pass takes fifty times as long in bfloat16 as in
# float32, and its forward pass six times.
#
# Guess: bfloat16 is widened to float32 on the way, so each of a linear layer's three products takes up to twice as long.
# Seen, torch 2.13.0, AVX2, one thread, 256 x 768 by 768 -> 3,072, float32 14 to 23 ms a product: in bfloat16 forward
# 120 ms, the weight's gradient 65 to 125 ms, the input's gradient (neither factor transposed) 1,660 ms. The same product
# with the weight stored the other way round takes 120 ms. So Trainer(bf16=True) or autocast runs on such a machine, warns
# of nothing, and a step takes tens of times as long.
# So: train in float32 where torch.ops.mkldnn._is_mkldnn_bf16_supported() is False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import time

import torch

if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("this processor has products for bfloat16, so there is nothing to see: nothing was checked")
    raise SystemExit(0)
torch.set_num_threads(1)


def milliseconds(product):
    seconds = []
    for _ in range(4):
        start = time.thread_time()
        product()
        seconds.append(time.thread_time() - start)
    return 1e3 * min(seconds)


taken = {}
for dtype in torch.float32, torch.bfloat16:
    x, weight, gradient = (torch.randn(shape).to(dtype) for shape in ((256, 768), (3072, 768), (256, 3072)))
    other_way = weight.t().contiguous().t()
    taken[dtype] = {
        "forward": milliseconds(lambda: x @ weight.t()),
        "input's gradient": milliseconds(lambda: gradient @ weight),
        "weight's gradient": milliseconds(lambda: gradient.t() @ x),
        "input's gradient, weight stored the other way": milliseconds(lambda: gradient @ other_way),
    }
slower = {name: taken[torch.bfloat16][name] / ms for name, ms in taken[torch.float32].items()}
for name, times in slower.items():
    print(f"{name}: {taken[torch.float32][name]:.0f} ms, in bfloat16 {times:.0f} times as long")
assert slower["input's gradient"] > 25, "changed"
assert slower["forward"] > 3 and slower["input's gradient, weight stored the other way"] < 20, "changed"
PYTHON
