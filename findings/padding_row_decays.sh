#!/usr/bin/env bash
# AdamW moves the padding row of an embedding, which nn.Embedding says stays fixed.
#
# Guess: padding_idx, "the embedding vector at padding_idx is not updated during training", holds whatever the
# optimizer.
# Seen, torch 2.13.0: the row gets a gradient of zero, not none, so decoupled weight decay shrinks it at every step:
# 1.0 is 0.366 after 100 steps with lr 0.1 and weight_decay 0.1. It goes unseen because that row usually starts at
# zero; in a table that was loaded it may hold anything.
# So: leave the table out of weight decay, or use an optimizer that leaves rows without a gradient alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

table = torch.nn.Embedding(3, 2, padding_idx=0)
with torch.no_grad():
    table.weight[0] = 1.0
optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
for _ in range(100):
    optimizer.zero_grad()
    table(torch.tensor([0, 1])).sum().backward()
    assert (table.weight.grad[0] == 0).all()
    optimizer.step()
print("padding row after 100 steps:", table.weight[0].tolist())
assert torch.allclose(table.weight[0], torch.tensor(0.99**100)), "changed"
PYTHON
