"""Which library multiplies in a linear layer, and the products by those that torch does not reach by itself.

The contract is in `fastbert.ops.linear`. torch computes float32 products on x86 processors by MKL ("torch" below),
which leaves the AVX-512 of AMD's processors unused. In bfloat16 it asks oneDNN, but pre-fills the output with the bias,
an extra pass over memory. The private op `mkldnn::_linear_pointwise` of the same torch, which has no autograd, reaches
oneDNN without either detour ("onednn"). On AMD's processors without AVX-512 both fall behind `csrc/cpu/linear.cpp`
("fastbert"): a little where there are many rows, by a half and more where there are few. They agree to rounding, not to
the bit. So that a program gives the same bits at every start, nothing is timed without being asked for: unless somebody
chooses, AMD's processors take "onednn" with AVX-512 and "fastbert" without, and all others "torch". All but float32 and
bfloat16 on a CPU is torch's; so are small products, at which torch is no slower, and the two without a bias of a
bfloat16 backward pass by "onednn". The choice holds under torch.compile too, whose own products would be MKL's.

A processor without AVX-512 has no bfloat16 products, and the loops that torch has in their place reach a sixth of its
float32 rate in a forward pass and a fortieth through both. There bfloat16 is multiplied in float32 and the results
rounded once: by "fastbert", which reads and writes bfloat16, or where that is not the choice by torch's own products
between two copies, which is what the twin does ("widened").
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from fastbert.backends import Choice, linear_product, native
from fastbert.backends import requested as requested_backend

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


def library_for(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The library that multiplies these: the chosen one, or "torch" where they are too small for it or not its kind.

    What `F.linear` refuses is torch's too, for its message. Raises as `use_linear` does.
    """
    if not isinstance(x, Tensor):
        return "torch"
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    name = chosen(cast or x.dtype)
    return name if name != "torch" and _fits(x, weight, bias, cast, name) else "torch"


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None, name: str) -> bool:
    """Whether `name` is worth it and takes these."""
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
        native.check_isa()
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


# ---- the products --------------------------------------------------------------------------------------------------


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
    if library == "fastbert":
        return linear_product.linear_product(x, weight, bias, x.dtype)
    dtype = _computed(x.dtype)
    return onednn_product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None,
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = dy if library == "fastbert" else dy.to(_computed(dy.dtype))  # once for both products
    dx = dy.new_empty(0) if weight is None else _unbiased(rows, weight.t(), dy.dtype, library)
    dweight = dy.new_empty(0) if x is None else _unbiased(rows.t(), x.t(), weight_dtype, library)
    dbias = dy.new_empty(0) if bias_dtype is None else dy.sum(0, dtype=bias_dtype)
    return dx, dweight, dbias


def _unbiased(x: Tensor, weight: Tensor, dtype: torch.dtype, library: str) -> Tensor:
    """x @ weight.T of the backward pass, in `dtype`."""
    if library == "fastbert":
        return linear_product.linear_product(x, weight, None, dtype)
    weight = weight.to(x.dtype)
    return (F.linear(x, weight) if x.dtype == torch.bfloat16 else onednn_product(x, weight, None)).to(dtype)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N] -> [M, N] of one dtype, M, N, K >= 1, of any strides."""
    if bias is not None:
        bias = bias.contiguous()  # oneDNN heeds the strides of the other two only
    if x.stride(0) == 1 and x.dtype == torch.float32 and native.module is not None:
        x = linear_product.transposed(x.t())  # torch would, six times as slowly
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiplies_rounded(library: str) -> bool:
    """Whether both factors of its bfloat16 products are bfloat16: then float32 weights are rounded once for all."""
    return library == "onednn" and bfloat16_products


def casts_weights(dtype: torch.dtype) -> bool:
    """Whether the library that is chosen here and now multiplies float32 weights in `dtype` under autocast."""
    library = chosen(dtype)
    return library == "torch" or (dtype == torch.bfloat16 and multiplies_rounded(library))


def _computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which oneDNN multiplies what is in `dtype`."""
    return dtype if bfloat16_products else torch.float32


# ---- constant weights ----------------------------------------------------------------------------------------------


def pack(weight: Tensor, dtype: torch.dtype, library: str) -> Tensor:
    """weight [N, K] in the order in which "onednn" or "fastbert" reads it beside an x in `dtype`."""
    if library == "fastbert":
        return linear_product.linear_packed(weight.to(dtype))
    # 512 rows of x are a guess; the layout it leads to serves other numbers as well
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(_computed(dtype)).contiguous(), 512)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int, depth: int) -> Tensor:
    """`linear_forward` by "fastbert", x [M, K], with a weight [columns, depth] that `pack` rearranged."""
    return linear_product.linear_product(x, packed, bias, x.dtype, (columns, depth))


def onednn_packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_forward` by "onednn", x [..., K] not empty, with a weight that `pack` rearranged."""
    dtype, x = x.dtype, x.contiguous().to(packed.dtype)
    bias = None if bias is None else bias.to(packed.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "").to(dtype)
