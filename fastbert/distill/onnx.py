"""A TextCNN or BiLSTM for ONNX's runtimes, which need neither torch nor this package."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert import extras, files
from fastbert.finetune.predict import load
from fastbert.models.small import SmallClassifier

OPSET = 18


class _Logits(nn.Module):
    def __init__(self, model: SmallClassifier):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).logits


def export(folder: str | os.PathLike) -> Path:
    """Writes model.onnx into the folder of a TextCNN or BiLSTM.

    Its inputs are `input_ids`, int64 [B, S], and `attention_mask`, int64 [B, S], 0 at padding, which stands behind a
    text; its output is `logits`, float32 [B, C]. B and S are any from 1 on.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError: no folder of such a model. ImportError: onnx or onnxscript is missing.
    """
    if why := extras.missing("writing ONNX needs", "onnx", "onnxscript"):
        raise ImportError(why)
    model = load(Path(folder))
    if not isinstance(model, SmallClassifier):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}: a TextCNN or BiLSTM is written as ONNX here, a transformer by "
            "Hugging Face's optimum"
        )
    ids, mask = torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        path = Path(name) / "model.onnx"
        torch.onnx.export(
            _Logits(model).eval(), (ids, mask), path, input_names=["input_ids", "attention_mask"],
            output_names=["logits"], dynamic_shapes=(sizes, sizes), opset_version=OPSET, dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
        files.write(folder, {"model.onnx": path.read_bytes()})
    return Path(folder) / "model.onnx"
