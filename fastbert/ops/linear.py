"""The product of a linear layer by whichever of torch's two libraries suits the processor.

    y = x @ weight.T + bias,   dx = dy @ weight,   dweight = dy.T @ x,   dbias = column sums of dy

x is [..., K], weight [N, K], bias [N], y [..., N]; backward saves x and weight.

torch computes float32 products on x86 processors by MKL ("torch" below), which is slow on those of AMD. In bfloat16 it
asks oneDNN, but writes the bias out first for the product to be added to. The private op `mkldnn::_linear_pointwise` of
the same torch, which has no autograd, reaches oneDNN without either detour ("onednn"). They agree to rounding, not to
the bit. So that a program gives the same bits at every start, nothing is timed behind its back: without a choice,
processors of AMD take "onednn" and all others "torch". All but float32 and bfloat16 on a CPU is `F.linear` as ever, and
so are small products, at which torch is no slower, and the two without a bias of a bfloat16 backward pass. The choice
holds under torch.compile too, whose own products would be MKL's.
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
_NO_BFLOAT16 = "oneDNN in this torch has no bfloat16 products for this processor"
SMALL = {torch.float32: 1 << 26, torch.bfloat16: 1 << 28}  # multiplications below which the op is no faster than torch


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
bfloat16_products = onednn_missing is None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_requested = os.environ.get("FASTBERT_LINEAR") or "auto"


def linear(x: Tensor, weight: "Tensor | FrozenWeight", bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 and bfloat16 on a CPU by the library that `use_linear` describes.

    Args:
        x: [..., K].
        weight: [N, K], or frozen by `fastbert.freeze`.
        bias: [N] or None.

    Returns:
        [..., N]; under autocast in the autocast dtype.

    Raises:
        ValueError: FASTBERT_LINEAR names no library, or one that this torch lacks.
        RuntimeError: shapes or dtypes that `F.linear` refuses, or a gradient through a frozen weight.
        TypeError: a frozen weight of another dtype than x.
    """
    if isinstance(weight, FrozenWeight):
        return weight.product(x, bias)
    if chosen() == "torch" or not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if x.dim() == 2:
        return _Linear.apply(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes these and is worth it; what `F.linear` refuses is left to it, for its message."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.dtype not in SMALL:
            return False
        if cast is None and tensor.dtype != x.dtype:
            return False
    computed = cast or x.dtype
    if computed not in SMALL or (computed == torch.bfloat16 and not bfloat16_products):
        return False
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if x.numel() * weight.shape[0] < SMALL[computed]:
        return False
    return bias is None or bias.shape == weight.shape[:1]


# ---- the choice ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_linear(name: str) -> Iterator[None]:
    """Within the `with` block products on a CPU are computed by `name`, in all threads of the process.

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
    return f"linear products by {chosen()} ({why}); onednn: {onednn_missing or 'ok'}"


def fastest(rows: int, size: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The faster library for x [rows, size] and weight [inner, size], forward and backward, timed within a second.

    Args:
        rows, size, inner: of the product.
        dtype: float32 or bfloat16, in which it is computed.

    Returns:
        "torch" or "onednn", and why in words. "onednn" only where its results equal torch's to rounding.
    """
    if onednn_missing:
        return "torch", onednn_missing
    if rows * size * inner < SMALL[dtype]:
        return "torch", "the products are small"
    if dtype == torch.bfloat16 and not bfloat16_products:
        return "torch", _NO_BFLOAT16
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, size), (inner, size), (rows, inner)
    x, weight, dy = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    inputs = x.requires_grad_(), weight.requires_grad_(), torch.zeros(inner, dtype=dtype, requires_grad=True)

    def run(name: str) -> list[Tensor]:
        with use_linear(name):
            y = linear(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    for ours, theirs in zip(run("onednn"), run("torch"), strict=True):
        if not (ours - theirs).abs().max() <= rounding * theirs.abs().max():
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
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N], M, N, K >= 1, of any strides; in float32 for backward too."""
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
        product = onednn_linear if dy.dtype == torch.float32 else F.linear
        dx = None if weight is None else product(dy, weight.t(), None)
        dweight = None if x is None else product(dy.t(), x.t(), None)
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


# ---- constant weights ----------------------------------------------------------------------------------------------


class FrozenWeight:
    """A linear layer's weight [N, K] as oneDNN multiplies by it fastest: rearranged once, constant from then on.

    An ordinary weight is read in an order that costs 5 % of a large product and a quarter of a small one. Copies share
    it; it cannot be trained or saved.

    Args:
        weight: [N, K], which is left as it is.
        dtype: float32 or bfloat16.

    Raises:
        As `check`.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.check(weight, dtype)
        self.shape, self.dtype = weight.shape, dtype
        with torch.no_grad():
            # 512 rows of x are a guess; the layout it leads to serves other numbers as well
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 512)

    @staticmethod
    def check(weight: Tensor, dtype: torch.dtype) -> None:
        """Raises where `weight` cannot be frozen in `dtype`.

        Raises:
            TypeError: neither float32 nor bfloat16.
            ValueError: a weight that is empty or not on the CPU.
            RuntimeError: this torch or processor has no such products.
        """
        if dtype not in SMALL:
            raise TypeError(f"weights are frozen in float32 or bfloat16, got {dtype}")
        if weight.device.type != "cpu" or weight.numel() == 0:
            raise ValueError(
                f"a weight to freeze must be on the cpu, got one of {list(weight.shape)} on {weight.device}"
            )
        if onednn_missing:
            raise RuntimeError(f"weights cannot be frozen here: {onednn_missing}")
        if dtype == torch.bfloat16 and not bfloat16_products:
            raise RuntimeError(f"weights cannot be frozen in bfloat16 here: {_NO_BFLOAT16}")

    def __deepcopy__(self, memo: dict) -> "FrozenWeight":
        return self

    def __reduce__(self):
        raise RuntimeError("a frozen weight cannot be saved: save the model before it is frozen")

    @torch.compiler.disable
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N]; under autocast x and bias are cast, as by `F.linear`."""
        if torch.is_autocast_enabled("cpu"):
            x, bias = (None if t is None else t.to(torch.get_autocast_dtype("cpu")) for t in (x, bias))
        if x.dtype != self.dtype or (bias is not None and bias.dtype != x.dtype):
            raise TypeError(
                f"a weight frozen in {self.dtype} takes x and bias of that dtype, got {x.dtype}"
                f"{'' if bias is None else f' and {bias.dtype}'}: run under torch.autocast, or freeze in another dtype"
            )
        if x.shape[-1:] != self.shape[1:]:
            raise RuntimeError(
                f"x must be [..., {self.shape[1]}] for a frozen weight {list(self.shape)}, got {list(x.shape)}"
            )
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise RuntimeError("a frozen weight gives no gradients: run under torch.inference_mode or torch.no_grad")
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.shape[0])
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, bias, "none", [], "")
