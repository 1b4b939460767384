"""Triton kernels, installed as `fastbert.kernels`. There are none yet."""
