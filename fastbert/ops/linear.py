"""The product of a linear layer by whichever library suits the processor: one of torch's two, or this package's.

    y = x @ weight.T + bias,   dx = dy @ weight,   dweight = dy.T @ x,   dbias = column sums of dy

x is [..., K], weight [N, K], bias [N], y [..., N]; backward saves x and weight.

torch computes float32 products on x86 processors by MKL ("torch" below), which leaves the AVX-512 of AMD's processors
unused. In bfloat16 it asks oneDNN, but writes the bias out first for the product to be added to. The private op
`mkldnn::_linear_pointwise` of the same torch, which has no autograd, reaches oneDNN without either detour ("onednn").
On AMD's processors without AVX-512 both fall behind `csrc/cpu/linear.cpp` ("fastbert"): a little where there are many
rows, by a half and more where there are few. They agree to rounding, not to the bit. So that a program gives the same
bits at every start, nothing is timed behind its back: without a choice, processors of AMD take "onednn" with AVX-512
and "fastbert" without, and all others "torch". All but float32 and bfloat16 on a CPU is `F.linear` as ever, and so are
small products, at which torch is no slower, and the two without a bias of a bfloat16 backward pass by "onednn". The
choice holds under torch.compile too, whose own products would be MKL's.

A processor without AVX-512 has no bfloat16 products, and the loops that torch has in their place reach a sixth of its
float32 rate in a forward pass and a fortieth through both. There bfloat16 is multiplied in float32 and the results
rounded once: by "fastbert", which reads and writes bfloat16, or where that is not the choice by torch's own products
between two copies ("widened"). float32 weights are taken as they are and their gradients not rounded.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from fastbert.backends import Choice, linear_product, native
from fastbert.backends import requested as requested_backend
from fastbert.ops.checks import check_tensor
from fastbert.ops.register import once_differentiable, opaque

NAMES = ("auto", "torch", "onednn", "widened", "fastbert")
DTYPES = (torch.float32, torch.bfloat16)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(4096)
    except OSError:
        return ""


# Read once, at import: torch.compile cannot trace them.
_amd, _avx512 = "AuthenticAMD" in _processor(), " avx512f" in _processor()
slow_mkl = _amd and _avx512
slow_libraries = _amd and not _avx512 and native.isa == "avx2"
onednn_missing = (
    None
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else f"torch {torch.__version__} here has no mkldnn::_linear_pointwise"
)
bfloat16_products = onednn_missing is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Multiplications below which a library is no faster than torch.
SMALL = {
    ("onednn", torch.float32): 1 << 26,
    ("onednn", torch.bfloat16): 1 << 28 if bfloat16_products else 1,
    ("fastbert", torch.float32): 3 << 24,
    ("fastbert", torch.bfloat16): 3 << 24 if bfloat16_products else 1,
    ("widened", torch.bfloat16): 1,
}
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
        RuntimeError: shapes, dtypes or devices that `F.linear` refuses, or a gradient through a frozen weight.
        TypeError: no tensors, or a frozen weight of another dtype than x.
    """
    if isinstance(weight, FrozenWeight):
        return weight.product(x, bias)
    if not isinstance(x, Tensor):
        return F.linear(x, weight, bias)  # for its message
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtype = cast or x.dtype
    name = chosen(dtype)
    if name == "torch" or not _fits(x, weight, bias, cast, name):
        return F.linear(x, weight, bias)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    if name == "onednn" and (dtype == torch.float32 or bfloat16_products):
        y = _Linear.apply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        y = _InFloat32.apply(rows, weight, bias, _PRODUCTS[name])
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None, name: str) -> bool:
    """Whether `name` is worth it and takes these; what `F.linear` refuses is left to it, for its message."""
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if type(tensor) not in (Tensor, Parameter):
            return False
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            return False
        if cast is None and tensor.dtype != x.dtype:
            return False
    computed = cast or x.dtype
    if computed not in DTYPES:
        return False
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if x.numel() * weight.shape[0] < SMALL[name, computed]:
        return False
    return bias is None or bias.shape == weight.shape[:1]


# ---- the choice ----------------------------------------------------------------------------------------------------


class _Block(Choice):
    """A `use_linear` block."""


_block = _Block()


@contextlib.contextmanager
def use_linear(name: str) -> Iterator[None]:
    """Within the `with` block products on a CPU are computed by `name`.

    It holds in the block's own context, as `use_backend` does. Outside of such blocks the environment variable
    FASTBERT_LINEAR chooses, in all threads, and without it "auto". A backward pass uses what its forward pass used.

    Args:
        name: "torch" (`F.linear`), "onednn", "fastbert" (this package's, in float32), "widened" (bfloat16 by torch's
            float32 products, all else `F.linear`), or "auto": "onednn" on AMD's processors with AVX-512, "fastbert" on
            those without (not where the backend "reference" is asked for), else "torch", and for bfloat16 "widened" on
            processors without such products. There "onednn" computes it in float32 too.

    Raises:
        ValueError: no library has that name, or it is missing here.
    """
    check(name)
    with _block.within(name):
        yield


def requested() -> str:
    """What the block or FASTBERT_LINEAR asks for, else "auto"; raises as `use_linear` does."""
    name = _block.now.name or _requested
    check(name)
    return name


def chosen(dtype: torch.dtype = torch.float32) -> str:
    """What computes here and now in this dtype, never "auto"; raises as `use_linear` does."""
    name = requested()
    if name == "auto" and slow_libraries and requested_backend() != "reference":
        return "fastbert"
    if name == "auto" and dtype == torch.bfloat16 and not bfloat16_products:
        return "widened"
    if name == "auto":
        return "onednn" if slow_mkl and onednn_missing is None else "torch"
    return "torch" if name == "widened" and dtype != torch.bfloat16 else name


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
    if name == "fastbert" and native.module is None:
        raise ValueError(f"products by 'fastbert' were asked for and cannot run here: {native.cpu_missing}")


def info() -> str:
    """What `fastbert info` says of it."""
    auto = f"auto: AMD processor with{'' if slow_mkl else 'out'} AVX-512" if slow_mkl or slow_libraries else "auto"
    why = auto if requested() == "auto" else "FASTBERT_LINEAR"
    lines = f"linear products by {chosen()} ({why}); onednn: {onednn_missing or 'ok'}"
    if not bfloat16_products:
        torchs = "by torch's loops, many times slower than float32"
        how = torchs if chosen(torch.bfloat16) == "torch" else "as float32 products"
        lines += f"\nthis processor has no bfloat16 products: they are computed {how}"
    return lines


def fastest(rows: int, size: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The fastest library for x [rows, size] and weight [inner, size], forward and backward, timed within a second.

    Args:
        rows, size, inner: of the product.
        dtype: float32 or bfloat16, in which it is computed.

    Returns:
        Its name, never "auto", and why in words. One whose results do not equal torch's to rounding does not count. So
        that a repeated run takes the same one, what is usual for the processor (`use_linear`'s "auto") stays unless
        another is faster by more than a tenth.
    """
    first = "torch" if dtype == torch.float32 or bfloat16_products else "widened"
    others = [name for name, why_not in (("onednn", onednn_missing), ("fastbert", native.cpu_missing)) if not why_not]
    in_vain = dtype == torch.bfloat16 and bfloat16_products  # "fastbert" computes in float32
    if in_vain or requested_backend() == "reference":
        others = [name for name in others if name != "fastbert"]
    others = [name for name in others if rows * size * inner >= SMALL[name, dtype]]
    if not others:
        return first, f"{rows} x {size} x {inner} is small, or no other library is there"
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, size), (inner, size), (rows, inner)
    x, weight, dy = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    inputs = x.requires_grad_(), weight.requires_grad_(), torch.zeros(inner, dtype=dtype, requires_grad=True)

    def run(name: str) -> list[Tensor]:
        with use_linear(name):
            y = linear(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def agree(name: str) -> bool:
        pairs = zip(run(name), run(first), strict=True)
        return all((ours - theirs).abs().max() <= rounding * theirs.abs().max() for ours, theirs in pairs)

    wrong = [name for name in others if not agree(name)]
    seconds: dict[str, list[float]] = {name: [] for name in (first, *others) if name not in wrong}
    end = time.perf_counter() + 0.3 * len(seconds)
    while len(seconds[first]) < 3 or time.perf_counter() < end:
        for name, taken in seconds.items():
            start = time.perf_counter()
            run(name)
            taken.append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    took = [f"{name} took {milliseconds:.1f} ms" for name, milliseconds in median.items()]
    best = settle(median, usual=chosen(dtype))
    return best, ", ".join(took + [f"{name} differs by more than rounding" for name in wrong])


def settle(milliseconds: dict[str, float], usual: str) -> str:
    """The fastest; of those within a tenth of it the usual one, else the first in the order of `NAMES`."""
    near = [name for name, taken in milliseconds.items() if taken <= 1.1 * min(milliseconds.values())]
    return min(near, key=lambda name: (name != usual, NAMES.index(name)))


# ---- the op --------------------------------------------------------------------------------------------------------


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N] of one dtype, M, N, K >= 1, of any strides.

    Used for backward in float32 alone.
    """
    if bias is not None:
        bias = bias.contiguous()  # oneDNN heeds the strides of the other two only
    if x.stride(0) == 1 and x.dtype == torch.float32 and native.module is not None:
        x = linear_product.transposed(x.t())  # torch would, six times as slowly
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


onednn_linear = opaque(onednn_linear, onednn_linear, lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


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


def fastbert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N] in `dtype`, M, N, K >= 1, of any strides; computed in float32.

    All are float32 or bfloat16, each for itself.
    """
    return linear_product.linear_product(x, weight, bias, dtype)


fastbert_linear = opaque(
    fastbert_linear,
    fastbert_linear,
    lambda x, weight, bias, dtype: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype),
)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int, depth: int) -> Tensor:
    """`fastbert_linear` in x's dtype with a weight [columns, depth] that `linear_product.linear_packed` rearranged."""
    return linear_product.linear_product(x, packed, bias, x.dtype, (columns, depth))


packed_linear = opaque(
    packed_linear, packed_linear, lambda x, packed, bias, columns, depth: x.new_empty(x.shape[0], columns)
)


def _widened(product):
    """A product of float32 with the arguments of `fastbert_linear`."""

    def between_copies(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return product(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)

    return between_copies


_PRODUCTS = {
    "widened": _widened(F.linear),
    "onednn": _widened(lambda x, weight, bias: onednn_linear(x, weight, bias)),
    "fastbert": fastbert_linear,
}


class _InFloat32(torch.autograd.Function):
    """By `product` in float32: y and dx in x's dtype, the gradients of weight and bias in theirs."""

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.options = x.dtype, weight.dtype, None if bias is None else bias.dtype, product
        return product(x, weight, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype, product = ctx.options
        dy = dy if product is fastbert_linear else dy.float()  # once for both
        dx = None if weight is None else product(dy, weight.t(), None, x_dtype)
        dweight = None if x is None else product(dy.t(), x.t(), None, weight_dtype)
        dbias = dy.sum(0, dtype=torch.float32).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


# ---- constant weights ----------------------------------------------------------------------------------------------


class FrozenWeight:
    """A linear layer's weight [N, K] rearranged once for products by oneDNN, or by "fastbert" where that is chosen.

    An ordinary weight is read in an order that costs 5 % of a large product and a quarter to a half of a small one.
    Copies share it; it is constant from then on and cannot be trained or saved.

    Args:
        weight: [N, K], which is left as it is.
        dtype: float32 or bfloat16, which a processor without bfloat16 products keeps in float32.

    Raises:
        As `check`.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.check(weight, dtype)
        self.shape, self.dtype = weight.shape, dtype
        self._ours = chosen(dtype) == "fastbert"
        with torch.no_grad():
            if self._ours:
                self._packed = linear_product.linear_packed(weight.to(dtype))
                return
            # 512 rows of x are a guess; the layout it leads to serves other numbers as well
            packed = dtype if bfloat16_products else torch.float32
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(packed).contiguous(), 512)

    @staticmethod
    def check(weight: Tensor, dtype: torch.dtype) -> None:
        """Raises where `weight` cannot be frozen in `dtype`.

        Raises:
            TypeError: neither float32 nor bfloat16.
            ValueError: a weight that is empty or not on the CPU.
            RuntimeError: this torch has no such products.
        """
        if dtype not in DTYPES:
            raise TypeError(f"weights are frozen in float32 or bfloat16, got {dtype}")
        if weight.device.type != "cpu" or weight.numel() == 0:
            raise ValueError(
                f"a weight to freeze must be on the cpu, got one of {list(weight.shape)} on {weight.device}"
            )
        if onednn_missing and chosen(dtype) != "fastbert":
            raise RuntimeError(f"weights cannot be frozen here: {onednn_missing}")

    def __deepcopy__(self, memo: dict) -> "FrozenWeight":
        return self

    def __reduce__(self):
        raise RuntimeError("a frozen weight cannot be saved: save the model before it is frozen")

    @torch.compiler.disable
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N]; under autocast x and bias are cast, as by `F.linear`."""
        for name, given in (("x", x), ("bias", bias)):
            if given is not None or name == "x":
                check_tensor(name, given)
        if torch.is_autocast_enabled("cpu"):
            x, bias = (None if t is None else t.to(torch.get_autocast_dtype("cpu")) for t in (x, bias))
        if x.dtype != self.dtype or (bias is not None and bias.dtype != x.dtype):
            raise TypeError(
                f"a weight frozen in {self.dtype} takes x and bias of that dtype, got {x.dtype}"
                f"{'' if bias is None else f' and {bias.dtype}'}: run under torch.autocast, or freeze in another dtype"
            )
        if x.shape[-1:] != self.shape[1:] or x.device.type != "cpu":
            raise RuntimeError(
                f"x must be [..., {self.shape[1]}] on the cpu for a frozen weight {list(self.shape)}, got "
                f"{list(x.shape)} on {x.device}"
            )
        if bias is not None and (bias.shape != self.shape[:1] or bias.device.type != "cpu"):
            raise RuntimeError(
                f"bias must be [{self.shape[0]}] on the cpu for a frozen weight {list(self.shape)}, got "
                f"{list(bias.shape)} on {bias.device}"
            )
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise RuntimeError("a frozen weight gives no gradients: run under torch.inference_mode or torch.no_grad")
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.shape[0])
        if self._ours:
            rows = x.reshape(-1, self.shape[1])
            return packed_linear(rows, self._packed, bias, *self.shape).view(*x.shape[:-1], self.shape[0])
        x, bias = (None if t is None else t.to(self._packed.dtype) for t in (x.contiguous(), bias))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "").to(self.dtype)
