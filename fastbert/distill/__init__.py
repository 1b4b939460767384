"""`fastbert distill`: a small model that learns from a trained classifier's outputs, or from a model's inside."""

from fastbert.distill.general import distill_general
from fastbert.distill.run import distill
from fastbert.distill.settings import DistillConfig, GeneralConfig

__all__ = ["DistillConfig", "GeneralConfig", "distill", "distill_general"]
