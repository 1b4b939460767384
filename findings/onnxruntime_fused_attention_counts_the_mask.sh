#!/usr/bin/env bash
# onnxruntime's optimizer for BERT gives another function for batches that are padded on the left.
#
# Guess: fusing nodes keeps the outputs for every mask, as its speed is all that is advertised.
# Seen, onnxruntime 1.32.0 with a BERT of transformers 5.23.0: the fused Attention node is given the sum of each row of
# attention_mask, as a length, and lets the first so many keys through. Right padding gives what it gave (1e-6 apart).
# Left padding, or a hole in a mask, moves the outputs of real tokens by up to 0.05 and more, without a word.
# So: pad on the right before such a model, or call optimize_model with FusionOptions whose use_raw_attention_mask(True)
# was called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import onnxruntime
import torch
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from transformers import BertConfig, BertModel


class LastHiddenState(torch.nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids, attention_mask).last_hidden_state


torch.manual_seed(0)
config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    attn_implementation="eager",
)
model = LastHiddenState(BertModel(config, add_pooling_layer=False)).eval()
words = torch.randint(1, 100, (2, 8))
right = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
masks = {"right padding": right, "left padding": right.flip(1), "a hole": right.roll(-2, 1)}
names = ["input_ids", "attention_mask"]
torch.onnx.export(
    model, (words, right), "plain.onnx", input_names=names, output_names=["out"], dynamo=False, opset_version=14
)
raw = FusionOptions("bert")
raw.use_raw_attention_mask(True)
for name, options in (("fused", None), ("raw", raw)):
    fused = optimizer.optimize_model(
        "plain.onnx", "bert", num_heads=4, hidden_size=64, opt_level=0, optimization_options=options
    )
    assert fused.get_fused_operator_statistics()["Attention"] == 2
    fused.save_model_to_file(f"{name}.onnx")

differences = {}
for file in ("plain", "fused", "raw"):
    session = onnxruntime.InferenceSession(f"{file}.onnx")
    for name, mask in masks.items():
        out = session.run(None, {"input_ids": words.numpy(), "attention_mask": mask.numpy()})[0]
        with torch.no_grad():
            expected = model(words, mask).numpy()
        differences[file, name] = np.abs((out - expected) * mask.numpy()[..., None]).max()
        print(f"{file}.onnx, {name}: real tokens differ from PyTorch by {differences[file, name]:.1e}")
wrong = {key for key, difference in differences.items() if difference > 1e-4}
assert wrong == {("fused", "left padding"), ("fused", "a hole")}, "changed"
PYTHON
