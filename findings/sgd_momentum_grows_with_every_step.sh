#!/usr/bin/env bash
# SGD with momentum over sparse gradients: the momentum buffer of an embedding grows at every step, past the table itself.
#
# Guess: the buffer holds each row that has had a gradient once, so at most the table, as a dense one would.
# Seen, torch 2.13.0: adding a new step's rows to the buffer puts them behind those that are there wherever neither is
# coalesced, and nothing ever coalesces it. A table of 1,000 rows, 50 words a step: some 18,800 entries after 400 steps, for
# 1,000 distinct rows; memory, checkpoint and time of a step grow on with the steps. The values are right.
# So: coalesce the buffer now and then, or use an optimizer whose state is dense where gradients are sparse.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

torch.manual_seed(0)
table = torch.nn.Embedding(1000, 8, sparse=True)
optimizer = torch.optim.SGD(table.parameters(), lr=0.01, momentum=0.9)
for step in range(1, 401):
    optimizer.zero_grad()
    table(torch.randint(1000, (50,))).sum().backward()
    optimizer.step()
    if step % 100 == 0:
        buffer = optimizer.state[table.weight]["momentum_buffer"]
        rows = buffer.coalesce()._nnz()
        print(f"step {step}: {buffer._nnz()} entries in the momentum buffer, {rows} distinct rows")
assert buffer._nnz() > 10 * rows, "changed"
PYTHON
