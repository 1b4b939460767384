"""Triton kernels: a file for each op, with the functions of its reference twin, for GPUs of NVIDIA and of AMD.

They import torch, Triton and each other. Nothing is imported here, so that Triton is loaded when a kernel is called.
"""
