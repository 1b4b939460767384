"""The product of a linear layer by whichever of torch's two libraries suits the processor.

    y = x @ weight.T + bias,   dx = dy @ weight,   dweight = dy.T @ x,   dbias = column sums of dy

x is [..., K], weight [N, K], bias [N], y [..., N]; backward saves x and weight.

torch computes float32 products on x86 processors by MKL ("torch" below), which is slow on those of AMD. oneDNN, inside
the same torch, is reached by the private op `mkldnn::_linear_pointwise`, which has no autograd ("onednn"). They agree
to rounding, not to the bit. So that a program gives the same bits at every start, nothing is timed behind its back:
without a choice, processors of AMD take "onednn" and all others "torch". All but float32 on a CPU outside autocast is
`F.linear` as ever (in bfloat16 that is oneDNN already), and so are small products, at which MKL is the faster one. The
choice holds under torch.compile too, whose own products would be MKL's.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastbert import native
from fastbert.ops.register import fake, register

NAMES = ("auto", "torch", "onednn")
SMALL = 1 << 27  # multiplications below which oneDNN is no faster: its cost per call, and small matrices rearranged


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return "AMD" if "AuthenticAMD" in file.read(200) else "other"
    except OSError:
        return "unknown"


# Read once, at import: torch.compile cannot trace either.
vendor = _vendor()
onednn_missing = (
    None
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else f"torch {torch.__version__} here has no mkldnn::_linear_pointwise"
)
_requested = os.environ.get("FASTBERT_LINEAR") or "auto"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 on a CPU by the library that `use_linear` describes.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N]; under autocast in the autocast dtype.

    Raises:
        ValueError: FASTBERT_LINEAR names no library, or one that this torch lacks.
        RuntimeError: shapes or dtypes that `F.linear` refuses.
    """
    if chosen() == "torch" or not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        return _Linear.apply(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes these and is worth it; what `F.linear` refuses is left to it, for its message."""
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            return False
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.numel() * weight.shape[0] < SMALL:
        return False
    return (bias is None or bias.shape == weight.shape[:1]) and not torch.is_autocast_enabled("cpu")


# ---- the choice ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_linear(name: str) -> Iterator[None]:
    """Within the `with` block float32 products on a CPU are computed by `name`, in all threads of the process.

    Outside of such blocks the environment variable FASTBERT_LINEAR chooses, and without it "auto". A backward pass uses
    what its forward pass used.

    Args:
        name: "torch" (`F.linear`), "onednn", or "auto": "onednn" on AMD's processors where it is there, else "torch".

    Raises:
        ValueError: no library has that name, or this torch lacks it.
    """
    global _requested
    check(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def requested() -> str:
    """What the block or FASTBERT_LINEAR asks for, else "auto"; raises as `use_linear` does."""
    check(_requested)
    return _requested


def chosen() -> str:
    """What computes here and now, "torch" or "onednn"; raises as `use_linear` does."""
    name = requested()
    if name == "auto":
        return "onednn" if vendor == "AMD" and onednn_missing is None else "torch"
    return name


def check(name: str) -> None:
    """Raises unless `use_linear` takes this name here."""
    if name not in NAMES:
        raise ValueError(
            f"no library of products is called {name!r}: use_linear and FASTBERT_LINEAR take one of {', '.join(NAMES)}"
        )
    if name == "onednn" and onednn_missing:
        raise ValueError(
            f"products by 'onednn' were asked for and cannot run here: {onednn_missing}. FASTBERT_LINEAR=torch takes "
            "torch's, equal to rounding"
        )


def info() -> str:
    """What `fastbert info` says of it."""
    why = f"auto: {vendor} processor" if requested() == "auto" else "FASTBERT_LINEAR"
    return f"float32 products by {chosen()} ({why}); onednn: {onednn_missing or 'ok'}"


def fastest(rows: int, size: int, inner: int) -> tuple[str, str]:
    """The faster library for x [rows, size] and weight [inner, size], forward and backward, timed within a second.

    Returns:
        "torch" or "onednn", and why in words. "onednn" only where its results equal torch's to rounding.
    """
    if onednn_missing:
        return "torch", onednn_missing
    if rows * size * inner < SMALL:
        return "torch", "the products are small"
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=draw) for shape in ((rows, size), (inner, size), (rows, inner)))
    inputs = x.requires_grad_(), weight.requires_grad_(), torch.zeros(inner, requires_grad=True)

    def run(name: str) -> list[Tensor]:
        with use_linear(name):
            y = linear(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    for ours, theirs in zip(run("onednn"), run("torch"), strict=True):
        if not (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max():
            return "torch", "onednn's results differ by more than rounding"
    seconds: dict[str, list[float]] = {"torch": [], "onednn": []}
    end = time.perf_counter() + 0.6
    while len(seconds["torch"]) < 3 or time.perf_counter() < end:
        for name, taken in seconds.items():
            start = time.perf_counter()
            run(name)
            taken.append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    return min(median, key=median.get), f"onednn took {median['onednn']:.1f} ms and torch {median['torch']:.1f}"


# ---- the op --------------------------------------------------------------------------------------------------------


@register
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N], M, N, K >= 1, of any strides; backward's products too."""
    if bias is not None:
        bias = bias.contiguous()  # oneDNN heeds the strides of the other two only
    if x.stride(0) == 1 and native.module is not None:
        x = native.cpu.transposed(x.t())  # torch would, six times as slowly
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@fake("onednn_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = None if weight is None else onednn_linear(dy, weight.t(), None)
        dweight = None if x is None else onednn_linear(dy.t(), x.t(), None)
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None
