"""The gradient of an embedding table by `_cuda`; the contract is in `fastbert.ops.embedding`."""

from torch import Tensor

from fastbert.backends.native import DTYPES, launcher


def embedding_backward(dtable: Tensor, dx: Tensor, ids: Tensor, padding_idx: int, fills: bool) -> None:
    dx, ids = dx.contiguous(), ids.contiguous()
    module, launch = launcher(dx, dx.numel())
    module.embedding_backward(
        dx.data_ptr(), ids.data_ptr(), padding_idx, fills, dtable.data_ptr(), *dx.shape, len(dtable), DTYPES[dx.dtype],
        launch,
    )  # fmt: skip
