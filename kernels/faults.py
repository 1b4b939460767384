"""How a kernel reports an id or a bound that it cannot use, without a wait for the device.

A kernel that meets such an id neither reads nor writes by it, calls `raise_fault`, and goes on: the result that belongs
to it is NaN, and a step by it changes nothing. The words lie in memory of the host that every GPU can write, so every
later call can look at them, also after replays of a captured graph: `words` raises what earlier calls have reported,
and so does `fastbert.check_device_errors`, which waits for the device first. In the interpreter, whose kernels have
run when their launcher returns, `raise_interpreted` raises at once, as ops on the CPU do.
"""

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LABEL = tl.constexpr(0)
SEQUENCE = tl.constexpr(1)
ROW = tl.constexpr(2)
MISSED = tl.constexpr(3)
EMBEDDING = tl.constexpr(4)
_FOUND = (  # what, and the consequence; the place stands between them
    (
        "cross_entropy was given a label that is neither in [0, V) nor ignore_index, in row ",
        ": loss and gradient of that row are NaN",
    ),
    (
        "attention was given cu_seqlens that decrease, do not go from 0 to the number of tokens, or make a sequence "
        "longer than max_seqlen, at sequence ",
        ": its results are undefined",
    ),
    ("lazy_adam was given a row id outside its table, at place ", " of rows: that step changed nothing"),
    (
        "lazy_adam_replay was given a row that stands before the recorded steps, at place ",
        " of rows: it brought none",
    ),
    ("embedding_norm was given an id outside its table, for token ", ": the result of that token is NaN"),
)


class _Words(NamedTuple):
    tensor: Tensor  # int32, one a fault: 0, or 1 + the place of one that was found
    numbers: ctypes.Array  # the same memory; to look at it takes no op of torch


_words: dict[bool, _Words] = {}  # the interpreter's, and those of all GPUs


@triton.jit
def raise_fault(words_ptr, FAULT: tl.constexpr, place, wrong):
    """`place`, from 0, is the id's own, a number or a block of them, and `wrong` says which; of several one remains."""
    word = tl.minimum(place.to(tl.int64), 0x7FFFFFFE) + 1
    tl.store(words_ptr + FAULT + (word - word).to(tl.int32), word.to(tl.int32), mask=wrong)


def words(x: Tensor) -> Tensor:
    """What kernels on x's device report to.

    Raises:
        ValueError: of an earlier call, see `check`.
    """
    check()
    if x.is_cpu not in _words:
        made = torch.zeros(len(_FOUND), dtype=torch.int32, device="cpu", pin_memory=not x.is_cpu)
        _words[x.is_cpu] = _Words(made, (ctypes.c_int32 * len(_FOUND)).from_address(made.data_ptr()))
    return _words[x.is_cpu].tensor


def check() -> None:
    """Raises what kernels have reported since it was last called, and forgets it. It waits for none.

    Raises:
        ValueError: of an earlier call; it names the op and the place of the id.
    """
    found = []
    for on_cpu, (_, numbers) in _words.items():
        for fault, number in enumerate(numbers):
            if number:
                what, consequence = _FOUND[fault]
                when = "" if on_cpu else "found by a GPU in an earlier call: "
                found.append(f"{when}{what}{number - 1}{consequence}")
                numbers[fault] = 0
    if found:
        raise ValueError("; ".join(found))


def raise_interpreted(x: Tensor) -> None:
    """`check` where x's kernels have run already."""
    if x.is_cpu:
        check()
