"""Gradients of several backward passes added up by a few kernels, where autograd takes one or two a parameter."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 64 << 20  # bytes of float32 that gradients of 16 bits are widened to at a time


class AddedGradients:
    """Takes gradients away behind each backward pass and adds them up, those of 16 bits in float32.

        added = AddedGradients(model.parameters())
        for batch in micro_batches:
            loss(model(batch)).backward()
            added.take()
        added.give_back()  # every `grad` is now the sum

    Between two passes there is a gradient more of every parameter than autograd would keep. Nothing waits for a device.

    Args:
        params: whose `grad_dtype` becomes None, so that a sum may be wider than what a pass gives. A sparse gradient is
            left where it is, for autograd to add up.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = [param for param in params if param.requires_grad]
        for param in self._params:
            param.grad_dtype = None
        self._sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, params: Iterable[Tensor] | None = None) -> None:
        """Adds what the last backward pass made of gradients, of all or of these parameters, and leaves None."""
        among = self._params if params is None else params
        given = [p for p in among if p.grad is not None and p.grad.layout is torch.strided]
        for params in _chunks(given):
            grads = [param.grad for param in params]
            if grads[0].dtype in (torch.bfloat16, torch.float16):
                wide = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
                torch._foreach_copy_(wide, grads)
                grads = wide
            earlier = [(self._sums[p], grad) for p, grad in zip(params, grads, strict=True) if p in self._sums]
            if earlier:
                torch._foreach_add_(*map(list, zip(*earlier, strict=True)))
            self._sums |= {p: grad for p, grad in zip(params, grads, strict=True) if p not in self._sums}
            for param in params:
                param.grad = None

    def give_back(self, params: Iterable[Tensor] | None = None) -> None:
        """Every gradient, or that of these parameters, becomes the sum."""
        for param in list(self._sums if params is None else params):
            if param in self._sums:
                param.grad = self._sums.pop(param)

    def complete(self, params: Iterable[Tensor] | None = None) -> None:
        """Gradients of the last backward pass become the sums of all."""
        self.take(params)
        self.give_back(params)


def _chunks(params: list[Tensor]) -> list[list[Tensor]]:
    """Those whose gradients have one dtype together, until they would be `CHUNK` bytes in float32."""
    chunks, last, room = [], None, 0
    for param in sorted(params, key=lambda param: str(param.grad.dtype)):  # in their order otherwise
        if param.grad.dtype != last or room <= 0:
            chunks.append([])
            last, room = param.grad.dtype, CHUNK
        chunks[-1].append(param)
        room -= 4 * param.grad.numel()
    return chunks
