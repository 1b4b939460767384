#!/usr/bin/env bash
# A sequence that is all padding: scaled_dot_product_attention gives 0, nn.MultiheadAttention NaN.
#
# Guess: the module calls the function, so both say the same.
# Seen, torch 2.13.0: a query that sees no key gives 0 in the function. The module gives NaN with need_weights=True,
# its default, which computes softmax itself, and 0 (its output bias) with need_weights=False, which calls the
# function. Looking at the weights changes the result, and one empty row of a batch makes every gradient NaN.
# So: batches that are filled up with empty sequences need need_weights=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

torch.manual_seed(0)
x = torch.randn(1, 2, 8)
nothing = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
heads = x.view(1, 2, 2, 4).transpose(1, 2)
function = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=nothing)
module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
padding = torch.ones(1, 2, dtype=torch.bool)
with_weights = module(x, x, x, key_padding_mask=padding)[0]
without = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
print("function:", function.abs().max().item())
print("module:", with_weights.flatten()[0].item(), "with need_weights=False:", without.abs().max().item())
assert (function == 0).all() and with_weights.isnan().all() and (without == module.out_proj.bias).all(), "changed"
PYTHON
