"""Tensors -> addresses and sizes: the C++ module behind the contract that the reference twins define.

`cpu` is a namespace with the functions of that contract (`gelu_forward`, ...). It takes tensors as the public ops hand
them over, checked; what is checked here is only what the kernels need and the twins do not.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from fastbert import _cpu as module

    cpu_missing: str | None = None
except ImportError as error:
    module = None
    cpu_missing = (
        f"the C++ module is not there ({error}): it was left out with FASTBERT_BUILD=0 or built for another Python; "
        "reinstall fastbert-kernels with a C++ compiler present"
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_LIMIT = 2**31  # of a window: past every sequence

forced_isa = os.environ.get("FASTBERT_CPU_ISA", "")  # read once, here


def _choose_isa() -> str | None:
    """The instruction set whose kernels run: the best of this machine, or the one that FASTBERT_CPU_ISA names."""
    if forced_isa:
        try:
            if module is None:
                raise ValueError(cpu_missing)
            module.use(forced_isa)
        except ValueError as error:
            raise ValueError(
                f"FASTBERT_CPU_ISA names the instruction set that the C++ kernels must use, and {forced_isa!r} cannot "
                f"be had: {error}. Without the variable the best of them is used"
            ) from None
    return None if module is None else module.selected()


isa: str | None = _choose_isa()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF


def _threads(elements: int) -> int:
    """Threads for a kernel over so many elements: one where starting others costs more than it saves."""
    return torch.get_num_threads() if elements >= 32768 else 1


def _heads(x: Tensor) -> Tensor:
    """[T, N, D] as the attention kernels take it: any stride between tokens, heads D apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _along(x: Tensor) -> Tensor:
    """A matrix as `linear_product` takes it: elements of its rows or of its columns side by side."""
    return x if 1 in x.stride() else x.contiguous()


class cpu:  # a namespace, spelled as the backend is
    """The op contract on CPU tensors, run by `fastbert._cpu`."""

    @staticmethod
    def gelu_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = torch.empty_like(x)
        columns = x.shape[-1]
        rows = x.numel() // columns if columns else 0
        module.gelu_forward(
            _address(x), _address(bias), _address(y), rows, columns, DTYPES[x.dtype],
            DTYPES[x.dtype if bias is None else bias.dtype], approximate == "tanh", _threads(x.numel()),
        )  # fmt: skip
        return y

    @staticmethod
    def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
        dy, x = dy.contiguous(), x.contiguous()
        bias = None if bias is None else bias.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns if columns else 0
        dx = torch.empty_like(x)
        dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
        scratch = None if bias is None else x.new_empty(module.reduction_chunks(rows), columns, dtype=torch.float32)
        module.gelu_backward(
            _address(dy), _address(x), _address(bias), _address(dx), 0 if bias is None else _address(dbias),
            _address(scratch), rows, columns, DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype],
            approximate == "tanh", _threads(x.numel()),
        )  # fmt: skip
        return dx, dbias

    @staticmethod
    def layer_norm_forward(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        residual = None if residual is None else residual.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns if columns else 0
        y = torch.empty_like(x)
        z = x.new_empty(0) if residual is None and t == 0 else torch.empty_like(x)
        mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
        module.layer_norm_forward(
            _address(x), _address(residual), _address(weight), _address(bias), _address(y),
            _address(z) if z.numel() else 0, _address(mean), _address(rstd), rows, columns, eps, t,
            _seed(seed), DTYPES[x.dtype], DTYPES[weight.dtype], _threads(x.numel()),
        )  # fmt: skip
        return y, z, mean, rstd

    @staticmethod
    def layer_norm_backward(
        dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, t: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dy, z, weight = dy.contiguous(), z.contiguous(), weight.contiguous()
        columns = z.shape[-1]
        rows = z.numel() // columns if columns else 0
        dz = torch.empty_like(z)
        dx = z.new_empty(0) if t == 0 else torch.empty_like(z)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        scratch = z.new_empty(2, module.reduction_chunks(rows), columns, dtype=torch.float32)
        module.layer_norm_backward(
            _address(dy), _address(z), _address(weight), _address(mean), _address(rstd), _address(dz),
            0 if t == 0 else _address(dx), _address(dweight), _address(dbias), _address(scratch), rows, columns, t,
            _seed(seed), DTYPES[z.dtype], DTYPES[weight.dtype], _threads(z.numel()),
        )  # fmt: skip
        return dz, dx, dweight, dbias

    @staticmethod
    def cross_entropy_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        logits, labels = logits.contiguous(), labels.contiguous()
        rows, columns = logits.shape
        losses, maximum, total = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
        module.cross_entropy_forward(
            _address(logits), _address(labels), _address(losses), _address(maximum), _address(total), rows, columns,
            ignore_index, DTYPES[logits.dtype], _threads(logits.numel()),
        )  # fmt: skip
        return losses, maximum, total

    @staticmethod
    def cross_entropy_backward(
        dlosses: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
    ) -> Tensor:
        dlosses, logits, labels = dlosses.contiguous(), logits.contiguous(), labels.contiguous()
        dlogits = torch.empty_like(logits)
        module.cross_entropy_backward(
            _address(dlosses), _address(logits), _address(labels), _address(maximum), _address(total),
            _address(dlogits), *logits.shape, ignore_index, DTYPES[logits.dtype], _threads(logits.numel()),
        )  # fmt: skip
        return dlogits

    @staticmethod
    def linear_product(
        x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """x [M, K] @ weight [N, K].T + bias [N] -> [M, N] in `dtype`; all in float32 or bfloat16, M, N, K >= 1.

        With `shape`, the weight's, `weight` is what `linear_packed` made of it.
        """
        x = _along(x)
        weight = weight if shape else _along(weight)
        (columns, depth), (row, column) = shape or weight.shape, (0, 0) if shape else weight.stride()
        if min(*x.shape, columns) == 0 or x.shape[1] != depth:
            raise ValueError(
                f"x [M, K] @ weight [N, K].T: all at least 1, got {list(x.shape)} and [{columns}, {depth}]"
            )
        bias = None if bias is None else bias.contiguous()
        y = x.new_empty(x.shape[0], columns, dtype=dtype)
        module.linear_product(
            _address(x), _address(weight), _address(bias), _address(y), *x.stride(), column, row, x.shape[0], columns,
            depth, DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype],
            DTYPES[torch.float32 if bias is None else bias.dtype], shape is not None, torch.get_num_threads(),
        )  # fmt: skip
        return y

    @staticmethod
    def linear_packed(weight: Tensor) -> Tensor:
        """weight [N, K] in float32 or bfloat16 -> float32 numbers in the order in which `linear_product` reads them."""
        weight = _along(weight)
        columns, depth = weight.shape
        packed = weight.new_empty(module.linear_packed(depth, columns), dtype=torch.float32)
        module.linear_pack(
            _address(weight), _address(packed), weight.stride(1), weight.stride(0), columns, depth,
            DTYPES[weight.dtype], _threads(weight.numel()),
        )  # fmt: skip
        return packed

    @staticmethod
    def transposed(x: Tensor) -> Tensor:
        """x [M, N] float32, contiguous along N -> [N, M] contiguous."""
        if x.dtype != torch.float32:
            raise TypeError(f"the kernel moves words of four bytes, float32, got {x.dtype}")
        y = x.new_empty(x.shape[1], x.shape[0])
        module.transpose(_address(x), _address(y), *x.shape, x.stride(0), _threads(x.numel()))
        return y

    @staticmethod
    def attention_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, t: int,
        seed: Tensor | None, causal: bool, window: list[int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v, cu_seqlens = _heads(q), _heads(k), _heads(v), cu_seqlens.contiguous()
        tokens, heads, head_dim = q.shape
        out = q.new_empty(q.shape)
        lse = q.new_empty(tokens, heads, dtype=torch.float32)
        left, right = _window(causal, window)
        module.attention_forward(
            _address(q), _address(k), _address(v), _address(out), _address(lse), _address(cu_seqlens), q.stride(0),
            k.stride(0), v.stride(0), tokens, cu_seqlens.numel() - 1, heads, head_dim, left, right, scale, t,
            _seed(seed), DTYPES[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        scale: float, t: int, seed: Tensor | None, causal: bool, window: list[int] | None,
    ) -> Tensor:  # fmt: skip
        q, k, v, cu_seqlens = _heads(q), _heads(k), _heads(v), cu_seqlens.contiguous()
        dout, out = dout.contiguous(), out.contiguous()
        tokens, heads, head_dim = q.shape
        dqkv = q.new_empty(tokens, 3, heads, head_dim)
        left, right = _window(causal, window)
        module.attention_backward(
            _address(dout), _address(q), _address(k), _address(v), _address(out), _address(lse),
            _address(dqkv), _address(cu_seqlens), q.stride(0), k.stride(0), v.stride(0), tokens, cu_seqlens.numel() - 1,
            heads, head_dim, left, right, scale, t, _seed(seed), DTYPES[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return dqkv

    @staticmethod
    def lazy_adam_steps(steps: Sequence[tuple]) -> None:
        arguments, kept = [], []  # tensors made here live until the kernels are done
        for (
            param, exp_avg, exp_avg_sq, max_exp_avg_sq, row_steps, rows, grad, lr, step, seed, beta1, beta2, eps,
            weight_decay, flags, padding_idx, number,
        ) in steps:  # fmt: skip
            table_rows, touched = param.shape[0] if param.dim() else 1, 0
            scratch, grad = None, (grad if grad.dtype in DTYPES else grad.float()).resolve_neg().contiguous()
            if rows is not None:
                touched, rows = rows.numel(), rows.contiguous()
                if touched == 0:
                    continue  # its address is null, which the kernel reads as every row
                if touched >= 2**31:
                    raise ValueError(f"a step takes fewer than 2**31 gradient rows, got {touched}: split the batch")
                scratch = param.new_empty(module.lazy_adam_scratch(touched), dtype=torch.int32)
            elements = param.numel()
            arguments.append((
                param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), _address(max_exp_avg_sq),
                _address(row_steps), _address(rows), grad.data_ptr(), _address(scratch), table_rows, touched,
                elements // table_rows if table_rows else 0, DTYPES[param.dtype], DTYPES[exp_avg.dtype],
                DTYPES[grad.dtype], exp_avg_sq.numel() != elements, seed is not None, _seed(seed), number, padding_idx,
                float(lr), float(step), beta1, beta2, eps, weight_decay, flags,
            ))  # fmt: skip
            kept.append((table_rows, rows, grad, scratch))
        bad = module.lazy_adam_steps(arguments, torch.get_num_threads())
        if bad >= 0:
            table_rows, rows, *_ = kept[bad]
            row = int(rows[(rows < 0) | (rows >= table_rows)][0])
            raise ValueError(f"row ids must lie in [0, {table_rows}), got {row}; nothing was changed")

    @staticmethod
    def lazy_adam_replay(
        param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last_step: Tensor, rows: Tensor | None, lr: Tensor,
        decay: Tensor, step: int, beta1: float, beta2: float, eps: float, flags: int, padding_idx: int,
    ) -> None:  # fmt: skip
        table_rows, named = param.shape[0], 0 if rows is None else rows.numel()
        columns = param.numel() // max(table_rows, 1)
        if param.numel() == 0 or (rows is not None and named == 0):
            return
        rows = None if rows is None else rows.contiguous()
        scratch = param.new_empty(module.lazy_adam_replay_scratch(lr.numel()), dtype=torch.float64)
        lr, decay = lr.contiguous(), decay.contiguous()
        bad = module.lazy_adam_replay(
            _address(param), _address(exp_avg), _address(exp_avg_sq), _address(last_step), _address(rows),
            _address(lr), _address(decay), _address(scratch), table_rows, named, columns, lr.numel(), step,
            padding_idx, beta1, beta2, eps, flags, _threads((named or table_rows) * columns),
        )  # fmt: skip
        if bad >= 0:
            row = bad if rows is None else int(rows[bad])
            if 0 <= row < table_rows:
                raise ValueError(behind_the_record(row, int(last_step[row]), step, lr.numel()))
            raise ValueError(f"row ids must lie in [0, {table_rows}), got {row} at position {bad}; nothing was changed")


def behind_the_record(row: int, last_step: int, step: int, recorded: int) -> str:
    """Says that lazy_adam_replay does not know the steps a row missed."""
    return (
        f"last_step must be {step - recorded} or more, as the {recorded} steps up to {step} are recorded; got "
        f"{last_step} for row {row}; nothing was changed"
    )


def _window(causal: bool, window: list[int] | None) -> tuple[int, int]:
    """(left, right): key j is visible to query i where i - left <= j <= i + right."""
    left, right = (_NO_LIMIT, _NO_LIMIT) if window is None else window
    return left, min(right, 0) if causal else right
