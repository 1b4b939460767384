"""`fastbert pretrain`: from raw text to a model that `transformers` loads. The loop itself is in `loop`."""

from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.settings import PretrainConfig

__all__ = ["PretrainConfig", "pretrain"]
