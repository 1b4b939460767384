"""A table of many tensors' addresses and sizes in a device's memory, so that one launch can work on all of them.

Each tensor is cut into chunks of `chunk` elements, one a program. Table [fields, MOST] int64: the number of a tensor's
first chunk, its elements, and then whatever the kernel wants to know of it. Places behind the last tensor have a first
chunk that no program reaches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MOST = 256  # tensors of one launch: what a program looks through at once
_spare: dict[tuple[int, ...], Tensor] = {}  # by shape; memory cannot be pinned while a graph is captured
_captured: list[Tensor] = []  # what replays of captured graphs copy from


@triton.jit
def find_tensor(table_ptr, CHUNK: tl.constexpr, MOST: tl.constexpr):
    """Of this program: where the table has its tensor's column, the tensor's elements, and where its chunk begins."""
    chunk = tl.program_id(0)
    first = tl.load(table_ptr + tl.arange(0, MOST))
    column_ptr = table_ptr + tl.sum((first <= chunk).to(tl.int32)) - 1
    return column_ptr, tl.load(column_ptr + MOST), (chunk - tl.load(column_ptr)) * CHUNK


@triton.jit
def address(column_ptr, FIELD: tl.constexpr, MOST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor's address in a field of the table; ALIGNED: to 16 bytes."""
    its = tl.load(column_ptr + FIELD * MOST).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        its = tl.multiple_of(its, 16)
    return its


def make_tables(launches: list[list[tuple[int, ...]]], chunk: int, device: torch.device) -> list[tuple[Tensor, int]]:
    """Of each launch the table, on the device, which is not waited for, and its number of chunks.

    Args:
        launches: of each the tensors, at most MOST: elements and further fields of the table.
    """
    made, fields = [], 1 + len(launches[0][0])
    host = _memory_of_host((len(launches), fields, MOST), device).fill_(1 << 62)
    for table, tensors in zip(host, launches, strict=True):
        chunks, columns = 0, []
        for elements, *others in tensors:
            columns.append((chunks, elements, *others))
            chunks += triton.cdiv(elements, chunk)
        table[:, : len(columns)] = torch.tensor(columns, dtype=torch.int64, device="cpu").T
        made.append(chunks)
    return list(zip(host.to(device, non_blocking=True), made, strict=True))


def _memory_of_host(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 that `device` can copy from: of a captured graph for good, and pinned by an earlier call."""
    if device.type != "cuda":
        return torch.empty(shape, dtype=torch.int64, device="cpu")
    if not torch.cuda.is_current_stream_capturing():
        if shape not in _spare:
            _spare[shape] = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
        return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
    its = _spare.pop(shape, None)
    if its is None:
        its = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
    _captured.append(its)
    return its
