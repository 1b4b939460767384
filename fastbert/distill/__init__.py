"""`fastbert distill`: a small model that learns from a trained classifier's outputs, besides labels."""

from fastbert.distill.run import distill
from fastbert.distill.settings import DistillConfig

__all__ = ["DistillConfig", "distill"]
