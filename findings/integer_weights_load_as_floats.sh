#!/usr/bin/env bash
# load_state_dict takes int8 codes of a quantised checkpoint for weights, without a word.
#
# Guess: strict loading compares names, shapes and dtypes, or at least refuses integers for a floating parameter.
# Seen, torch 2.13.0: "All keys matched successfully"; the codes -127 to 127 become the weights -127.0 to 127.0, and
# the scale that turns them into numbers is not asked for. A model quantised by others loads, runs, and answers
# nonsense.
# So: a loader must look at dtypes itself, and at quantization_config.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

layer = torch.nn.Linear(2, 2, bias=False)
weight = layer.weight.detach().clone()
scale = weight.abs().max() / 127
codes = (weight / scale).round().to(torch.int8)
result = layer.load_state_dict({"weight": codes}, strict=True)
print(result, layer.weight.tolist(), "in place of", weight.tolist())
assert not result.missing_keys and not result.unexpected_keys
assert torch.equal(layer.weight, codes.float()) and layer.weight.abs().max() == 127, "changed"
PYTHON
