"""How tests and benchmarks judge a result: by its distance to a float64 truth, beside that of PyTorch's own op."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# What is allowed beyond twice the baseline's own error, per unit of the largest true value: a few roundings of the
# dtype the result is stored in. Widen one only with the cause beside it.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(
    ours: Tensor, baseline: Tensor | None, truth: Tensor, what: str = "result", scale: float = 1e-30
) -> None:
    """Asserts `max|ours - truth| <= 2 * max|baseline - truth| + tolerance`, and NaN and inf in the same places.

    Args:
        ours: the result under test; its dtype picks the tolerance from `TOLERANCES`.
        baseline: the same computed by PyTorch in the same dtype; None allows the tolerance alone.
        truth: the same in float64.
        what: names the result in the message.
        scale: size of the terms, where the result is a difference of larger ones; the tolerance is per unit of the
            largest true value or of this.
    """
    assert ours.shape == truth.shape, f"{what} has shape {list(ours.shape)}, expected {list(truth.shape)}"
    finite = truth.isfinite()
    # A finite truth may lie beyond the dtype's range.
    expected = truth.to(ours.dtype)
    same = torch.equal(torch.nan_to_num(ours[~finite], nan=12345.0), torch.nan_to_num(expected[~finite], nan=12345.0))
    assert same, f"{what}: NaN or inf in other places than in the truth"
    if not finite.any():
        return
    true = truth[finite].double()
    error = _worst(ours[finite], true)
    allowed = TOLERANCES[ours.dtype] * max(true.abs().max().item(), scale)
    if baseline is not None:
        allowed += 2 * _worst(baseline[finite], true)
    assert error <= allowed, f"{what} is off by {error:.3e}, allowed {allowed:.3e}"


def _worst(x: Tensor, truth: Tensor) -> float:
    distance = (x.double() - truth).abs()
    return torch.where(x.double() == truth, 0.0, distance).max().item()


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The output of `function(*inputs)` and, with `dy` flowing back, the gradient of every input that is not None.

    `dy` is cast to the output's dtype.
    """
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    wanted = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype).reshape(y.shape))]
