"""What a step does with all gradients alike: it multiplies them, or leaves everything as it is."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class Scaling(NamedTuple):
    """Tensors of one number; None changes nothing."""

    grad_factor: Tensor | None  # gradients are multiplied by it
    found_inf: Tensor | None  # where it is not 0 the step changes nothing
    is_replayed: bool  # missed steps are recorded on the host, which has to know whether this is one

    def says_stop(self) -> bool:
        """Whether found_inf is set, looked at where that waits for no device or is needed; kernels look themselves."""
        if self.found_inf is None or not (self.found_inf.is_cpu or self.is_replayed):
            return False
        return bool(self.found_inf)

    def on(self, param: Tensor) -> "Scaling":
        """As the op takes it for a step of `param`."""
        if self.grad_factor is self.found_inf is None:
            return self
        dtypes = torch.float64 if param.dtype == torch.float64 else torch.float32, torch.float32
        numbers = [
            None if number is None else number.to(param.device, dtype)
            for number, dtype in zip((self.grad_factor, self.found_inf), dtypes, strict=True)
        ]
        return Scaling(*numbers, self.is_replayed)


def scaling_of(optimizer: Optimizer, grad_factor: Tensor | None) -> Scaling:
    """What `LazyAdam.step` was given, and what torch.amp.GradScaler has left as attributes of the optimizer."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    for name, number in (("grad_factor", grad_factor), ("grad_scale", scale), ("found_inf", found_inf)):
        if number is not None and not (isinstance(number, Tensor) and number.numel() == 1):
            raise TypeError(f"{name} must be a tensor of one number or None, got {number!r}")
    if scale is not None:
        inverse = scale.double().reciprocal()
        grad_factor = inverse if grad_factor is None else grad_factor.to(inverse.device) * inverse
    return Scaling(grad_factor, found_inf, any(group["missed"] == "replay" for group in optimizer.param_groups))
