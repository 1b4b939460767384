#!/usr/bin/env bash
# A bfloat16 embedding on a CPU: a word that stands in a batch 4,096 times gets the gradient of 256.
#
# Guess: gradients of repeated rows are added up in float32 and rounded once, as a matrix product does it.
# Seen, torch 2.13.0: with gradients of 1.0 the sum stops at 256 in bfloat16 and at 2,048 in float16, where adding 1
# changes nothing any more. Both ways do it: the dense gradient of nn.Embedding, and coalescing the sparse one, which
# is what SparseAdam does. The same sum as a product of a matrix of ones is 4,096.
# So: models wholly in bfloat16 train their most frequent words with a fraction of their gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import torch

warnings.simplefilter("ignore")
ids = torch.zeros(4096, dtype=torch.int64)
for dtype, stops in (torch.bfloat16, 256.0), (torch.float16, 2048.0):
    dense = torch.nn.Embedding(2, 1, dtype=dtype)
    dense(ids).sum().backward()
    sparse = torch.nn.Embedding(2, 1, dtype=dtype, sparse=True)
    sparse(ids).sum().backward()
    product = torch.ones(1, 4096, dtype=dtype) @ torch.ones(4096, 1, dtype=dtype)
    seen = dense.weight.grad[0].item(), sparse.weight.grad.coalesce().values().item(), product.item()
    print(dtype, "dense, coalesced, product:", seen)
    assert seen == (stops, stops, 4096.0), "changed"
PYTHON
