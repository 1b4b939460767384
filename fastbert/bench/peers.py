"""Other libraries' kernels for the same ops, where they are installed; none of them is needed.

Their names, and how each is called here: Liger-Kernel (Triton: LayerNorm, cross entropy), flash-attn (attention on
packed sequences), quack (CuTe: cross entropy) and FBGEMM (embedding tables with an optimizer fused into backward).
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert.bench.problem import Op

LIGER, FLASH, QUACK, FBGEMM, TRANSFORMERS = "Liger", "flash-attn", "quack", "FBGEMM", "transformers"
COMPILED = "torch.compile"
# Name -> the module to import, and the package to install.
PACKAGES = {
    LIGER: ("liger_kernel", "liger-kernel"),
    FLASH: ("flash_attn", "flash-attn"),
    QUACK: ("quack", "quack-kernels"),
    FBGEMM: ("fbgemm_gpu", "fbgemm-gpu-cpu, in the version that goes with this torch"),
    TRANSFORMERS: ("transformers", "transformers"),
}
ON_GPUS = LIGER, FLASH, QUACK


def why_not(name: str, device: str) -> str | None:
    """Why a peer does not take part on this device; None where it does."""
    module, package = PACKAGES[name]
    if name in ON_GPUS and device != "cuda":
        return "its kernels run on a GPU alone"
    if name == FBGEMM and device != "cpu":
        return "it is measured on a CPU alone"
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {package}"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever another package raises is its own reason
        return f"installed and broken: {first_line(error)}"
    return None


def why_not_compiled(is_wanted: bool) -> str | None:
    """Why torch.compile does not take part; None where it compiles a sum."""
    if not is_wanted:
        return "left out: by --quick, or --no-compile"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as error:  # torch's own classes, and the compiler's
        return f"it does not work here: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """An exception in a line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160]}" if said else type(error).__name__


def liger_layer_norm(eps: float) -> Op:
    """LayerNorm of rows x, weight and bias."""
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: function.apply(x, weight, bias, eps)


def liger_cross_entropy(labels: Tensor) -> Op:
    """The mean loss of logits. Its forward writes the gradient over the logits: it gets a copy, which is counted."""
    loss = importlib.import_module("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
    return lambda logits: loss(logits.clone(), labels)


def quack_cross_entropy(labels: Tensor) -> Op:
    """The mean loss of logits."""
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    return lambda logits: function(logits, labels)


def flash_attention(cu_seqlens: Tensor, longest: int, p: float) -> Callable[[Tensor], Tensor]:
    """Attention of one packed projection [T, 3, N, D], float16 or bfloat16."""
    function = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func
    return lambda qkv: function(qkv, cu_seqlens, longest, dropout_p=p)
