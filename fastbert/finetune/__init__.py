"""`fastbert finetune` and `fastbert predict`: a classifier of texts, or a regression, over any encoder.

Needs scikit-learn besides what `fastbert.data` does, which the extra `finetune` brings.
"""

from fastbert import extras

if why := extras.missing("fastbert.finetune needs", "sklearn", "scipy", "matplotlib", "tyro"):
    raise ImportError(why)

from fastbert.finetune.loop import finetune
from fastbert.finetune.predict import predict
from fastbert.finetune.settings import FinetuneConfig, PredictConfig

__all__ = ["FinetuneConfig", "PredictConfig", "finetune", "predict"]
