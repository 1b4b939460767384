"""One Adam step with decoupled weight decay, on the rows of a table [V, D] that a gradient touches or on all;
fastbert/ops/lazy_adam.py has the formula and its variants.

    group    1 launch that checks the ids, and torch.sort
    update   lazy_adam_rows.py    1 launch; with more than 16 gradient rows, all of which may be of one row, 1 more for
                                  pieces and 1 for each level of the tree above: 1 up to 512 gradient rows, 2 up to
                                  16,384, 3 up to 524,288
             lazy_adam_dense.py   1 launch for all dense tensors of the same dtypes and the same formula

Arithmetic is float32 for every dtype; w is rounded once, to nearest or stochastically. A gradient's rows are read where
they lie, once; those of one row are added up in float32, in an order that follows from the ids alone: a row of up to 16
in order of occurrence, and so in the CPU's bits, a longer one as a tree of such pieces, in CUDA's. Learning rate, step
count and seed are read on the device, and the host waits for nothing.

All parameters of a call are grouped before any is updated: where an id lies outside its table nothing at all is
changed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels import lazy_adam_dense as dense
from fastbert.kernels import lazy_adam_rows as rows
from fastbert.kernels.launch import launch
from fastbert.kernels.lazy_adam_update import FORMULA_FLAGS, GRAD_BY_ROW, SKIP_ZERO, formula
from fastbert.kernels.tensor_table import MOST, TYPES, make_tables

PIECE, PIECE_BITS, FAN_BITS = rows.PIECE.value, rows.PIECE_BITS.value, rows.FAN_BITS.value
WARPS, TILE = 4, 512  # of a program of rows, and elements that it works on at a time: four a thread, in every dtype
BLOCK = 128  # of them in a row, at most: what a warp has
IDS = 1024  # that a program checks


class Plan(NamedTuple):
    """How a table's columns are cut."""

    places: int  # of a program
    block: int  # columns at a time
    blocks: int  # of a program
    slices: int  # programs that share a row


def plan(columns: int, takes_whole_rows: bool) -> Plan:
    """BLOCK columns, or half of them where that leaves fewer threads without any; narrow rows share a warp."""
    half = BLOCK // 2
    block = BLOCK if triton.cdiv(columns, BLOCK) * 2 <= triton.cdiv(columns, half) else half
    block = min(block, max(8, triton.next_power_of_2(columns)))
    blocks = max(1, triton.cdiv(columns, block))
    return Plan(TILE // block, block, *((blocks, 1) if takes_whole_rows else (1, blocks)))


# ---- rows ----------------------------------------------------------------------------------------------------------


def group(s: Any, is_bad: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The ids of a step, sorted, and where each stood; `is_bad` and `words` get those that lie outside the table."""
    n, table_rows = s.rows.numel(), s.param.shape[0]
    keys = s.rows.new_empty(n, dtype=torch.int32 if table_rows < 2**31 else torch.int64)
    launch(rows.check_ids_kernel, (triton.cdiv(n, IDS),), s.rows, keys, is_bad, words, n, table_rows, BLOCK=IDS)
    return keys.sort(stable=True)


def update_rows(s: Any, keys: Tensor | None, position: Tensor | None, is_bad: Tensor | None) -> None:
    """Of the sorted ids or, without them, of the whole table."""
    table_rows = s.param.shape[0] if s.param.dim() else 1
    if table_rows == 0:
        return  # any id is outside
    columns = s.param.numel() // table_rows
    is_row_wise = s.exp_avg_sq.numel() != s.param.numel()
    takes_whole_rows = is_row_wise or s.row_steps is not None or bool(s.flags & SKIP_ZERO.value)
    its = plan(columns, takes_whole_rows)
    source = rows.TABLE if keys is None else rows.BY_ROW if s.flags & GRAD_BY_ROW else rows.SHORT
    n = table_rows if keys is None else keys.numel()
    has_pieces = source == rows.SHORT and n > PIECE
    sums = s.param.new_empty(triton.cdiv(n, 8), columns, dtype=torch.float32) if has_pieces else None

    def update(source: tl.constexpr, places: int, window_bits: int = 0, period_bits: int = 0) -> None:
        launch(
            rows.update_rows_kernel, (triton.cdiv(places, its.places), its.slices),
            s.param, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, s.row_steps, s.bf16_copy, keys, position, s.grad, sums,
            s.lr, s.step, s.seed, s.grad_factor, s.found_inf, is_bad, *formula(s),
            2 + 4 * s.number, s.padding_idx, n, n.bit_length(), window_bits, period_bits,
            FROM=source.value, FLAGS=s.flags & FORMULA_FLAGS, ROW_WISE=is_row_wise, D=columns, PLACES=its.places,
            BLOCK=its.block, BLOCKS=its.blocks, num_warps=WARPS,
        )  # fmt: skip

    update(source, n)
    if not has_pieces:
        return
    pieces = plan(columns, False)
    launch(
        rows.sum_pieces_kernel, (triton.cdiv(2 * triton.cdiv(n, PIECE), pieces.places), pieces.slices),
        keys, position, s.grad, sums, n, n.bit_length(), D=columns, PLACES=pieces.places, BLOCK=pieces.block,
        num_warps=WARPS,
    )  # fmt: skip
    bits = PIECE_BITS
    while 1 << bits < n:  # rows may be longer
        update(rows.NODES, 2 * triton.cdiv(n, 1 << bits), bits, bits + FAN_BITS)
        bits += FAN_BITS


# ---- dense tensors -------------------------------------------------------------------------------------------------


def is_dense(s: Any) -> bool:
    """Whether elements are all that matters of a step, not the rows that they stand in."""
    return (
        s.rows is None and s.row_steps is None and s.seed is None and s.padding_idx < 0
        and not s.flags & SKIP_ZERO.value and s.exp_avg_sq.numel() == s.param.numel()
    )  # fmt: skip


def update_tensors(steps: Sequence[Any], is_bad: Tensor | None) -> None:
    """All of them by one launch for each kind."""
    kinds: dict[tuple, list[Any]] = {}
    for s in steps:
        if s.param.numel():
            kinds.setdefault(_kind(s), []).append(s)
    launches = [its[i : i + MOST] for its in kinds.values() for i in range(0, len(its), MOST)]
    if not launches:
        return
    tables = make_tables([[_fields(s) for s in its] for its in launches], dense.CHUNK, steps[0].param.device)
    for (s, *_), (table, chunks) in zip(launches, tables, strict=True):
        launch(
            dense.update_tensors_kernel, (chunks,), table, s.lr, s.grad_factor, s.found_inf, is_bad, *formula(s),
            PARAM=TYPES[s.param.dtype], EXP_AVG=TYPES[s.exp_avg.dtype], GRAD=TYPES[s.grad.dtype],
            AMSGRAD=s.max_exp_avg_sq is not None, COPY=s.bf16_copy is not None, ALIGNED=_are_aligned(s),
            FLAGS=s.flags & FORMULA_FLAGS, CHUNK=dense.CHUNK, MOST=MOST, num_warps=dense.WARPS,
        )  # fmt: skip


def _tensors(s: Any) -> Iterator[Tensor | None]:
    yield from (s.step, s.param, s.exp_avg, s.exp_avg_sq, s.grad, s.max_exp_avg_sq, s.bf16_copy)


def _fields(s: Any) -> tuple[int, ...]:
    return s.param.numel(), *(0 if x is None else x.data_ptr() for x in _tensors(s))


def _are_aligned(s: Any) -> bool:
    return all(address % 16 == 0 for address in _fields(s)[2:])


def _kind(s: Any) -> tuple:
    """What one launch has in common."""
    same = (s.lr, s.grad_factor, s.found_inf)
    return (
        s.param.dtype, s.exp_avg.dtype, s.grad.dtype, s.max_exp_avg_sq is None, s.bf16_copy is None, _are_aligned(s),
        s.flags, s.beta1, s.beta2, s.eps, s.weight_decay, *(None if x is None else x.data_ptr() for x in same),
    )  # fmt: skip


# ---- launcher ------------------------------------------------------------------------------------------------------


def lazy_adam_steps(steps: Sequence[Any]) -> None:
    """Takes `fastbert.ops.lazy_adam.Step`s, checked, of parameters on one device."""
    steps = [readable(s) for s in steps if s.rows is None or s.rows.numel()]
    named = [s for s in steps if s.rows is not None]
    is_bad, groups = None, {}
    if named:
        param = named[0].param
        is_bad, words = param.new_zeros(1, dtype=torch.int32), faults.words(param)
        groups = {id(s): group(s, is_bad, words) for s in named}
        faults.raise_interpreted(param)
    for s in steps:
        if not is_dense(s):
            update_rows(s, *groups.get(id(s), (None, None)), is_bad)
    update_tensors([s for s in steps if is_dense(s)], is_bad)


def readable(s: Any) -> Any:
    """The step as kernels read it; where nothing has to be converted its tensors are the same."""
    device, lr = s.param.device, s.lr
    if not isinstance(lr, Tensor) or (lr.is_cpu and device.type != "cpu"):
        lr = torch.full((), float(lr), dtype=torch.float64, device=device)  # a kernel's argument: no copy to wait for
    return s._replace(
        rows=None if s.rows is None else s.rows.contiguous(),
        grad=(s.grad if s.grad.dtype in TYPES else s.grad.float()).resolve_neg().contiguous(),
        lr=lr.to(device, torch.float64),
        step=s.step.to(device, torch.float32),
    )
