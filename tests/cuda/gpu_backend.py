"""The backends "cuda" and "triton" on a real GPU for the tests of ops, which make their tensors on the CPU.

    with gpu_backend.installed("cuda", "triton"):
        fastbert.gelu(x, backend="triton")

Every call of a function of fastbert/backends or fastbert/kernels takes its tensors to the GPU and its results back;
what lies above, the checks and autograd, sees the CPU. Memory is carried whole: a strided view is one there too.
"""

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from emulated_backend import functions_of, taking_cpu_tensors
from torch import Tensor
from torch.utils._pytree import tree_map

from fastbert.backends import gradient_norm
from fastbert.optim import gradients, lazy_adam


class Carried:
    """The functions of a file of fastbert/backends, on `device`."""

    def __init__(self, kernels: ModuleType, device: str) -> None:
        self._kernels, self._device = kernels, device

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments: Any) -> Any:
            carried: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of the memory: it here and there
            results = getattr(self._kernels, name)(*tree_map(lambda x: self._carry(x, carried), arguments))
            if name.startswith("lazy_adam"):  # changes its arguments
                for here, there in carried.values():
                    here.copy_(there)
            return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, results)

        return call

    def _carry(self, x: Any, carried: dict[int, tuple[Tensor, Tensor]]) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in carried:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            carried[storage.data_ptr()] = here, here.to(self._device, copy=True)
        _, there = carried[storage.data_ptr()]
        whole = torch.empty(0, dtype=x.dtype, device=there.device).set_(there.untyped_storage())
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())


@contextlib.contextmanager
def installed(device: str, backend: str = "cuda") -> Iterator[None]:
    """Within the block the backend takes tensors of the CPU and computes on `device`."""
    if backend == "triton":
        norm = Carried(_in_triton(gradient_norm), device).gradient_norm
        with (
            taking_cpu_tensors(backend),
            functions_of(lambda kernels: Carried(_in_triton(kernels), device), backend),
            mock.patch.object(gradients, "norm_in_triton", norm),
        ):
            yield
        return
    with (
        taking_cpu_tensors(),
        functions_of(lambda kernels: Carried(kernels, device)),
        mock.patch.object(gradients, "gradient_norm", Carried(gradient_norm, device).gradient_norm),
        mock.patch.object(
            lazy_adam, "can_plan", False
        ),  # plans keep addresses, and what is carried has others each time
    ):
        yield


def _in_triton(kernels: ModuleType) -> ModuleType:
    """The file of fastbert/kernels that has the functions of this one of fastbert/backends."""
    return import_module(f"fastbert.kernels.{kernels.__name__.rpartition('.')[2]}")
