"""Triton's interpreter, made fit for tests: kernels run in Python, on tensors of the CPU, as a GPU would run them.

    with interpreter.installed():
        fastbert.gelu(x, backend="triton")

TRITON_INTERPRET=1 must be set before Triton is imported; tests/conftest.py does. What is mended or added here:

- bfloat16. The interpreter holds it as 16 bits, adds and multiplies these bits, and cuts where it should round to
  nearest. Arithmetic is done in float32 and rounded. Reductions and atomics of bfloat16, which kernels have no need
  of, are refused.
- Memory. Every address that is read or written must lie in a tensor: an argument of the kernel, or one whose address
  was asked for, as for a table of addresses. Without this check a kernel corrupts the heap, or reads what is not its.
- Time. The interpreter computes each sum and product of int32 once more in int64, compares, and asserts what it only
  looks at when it debugs: half of its time.
- A bound on what is interpreted: it takes a millisecond a program.

What it cannot show: layouts, registers, shared memory, races between programs, and the rounding of instructions that
are faster than exact. A launch runs its programs one after another, in the order of the grid.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as its
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16

# ---- bfloat16 ------------------------------------------------------------------------------------------------------


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 nearest to x, of two the even one; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    near = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), 0x7FC0, near).astype(np.uint16)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == BF16


def _in_float32(method: Callable) -> Callable:
    """A method of the builder that widens operands of bfloat16 and rounds the result, where it was to be bfloat16."""

    def call(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(_is_bf16(x) for x in operands):
            return method(self, *operands)
        result = method(self, *(TensorHandle(widened(x.data), tl.float32) if _is_bf16(x) else x for x in operands))
        handles = [x for x in operands if isinstance(x, TensorHandle)]
        is_number = result.data.dtype == np.float32  # and not what a comparison finds
        # The last is what a product of matrices is added to, and gives the type of everything else too.
        return TensorHandle(rounded(result.data), BF16) if is_number and _is_bf16(handles[-1]) else result

    return call


def _cast(method: Callable) -> Callable:
    def call(self: InterpreterBuilder, x: TensorHandle, target: Any, *mode: Any) -> TensorHandle:
        source, target = x.dtype.scalar, target.scalar
        if BF16 not in (source, target) or source == target:
            return method(self, x, target, *mode)
        data = widened(x.data) if source == BF16 else x.data.astype(np.float32)
        data = rounded(data) if target == BF16 else data.astype(its._get_np_dtype(target))
        return TensorHandle(data, target)

    return call


def _select(method: Callable) -> Callable:
    """Of what three operands make: a choice moves bits, all else is arithmetic."""
    arithmetic = _in_float32(method)

    def call(self: InterpreterBuilder, a: Any, b: Any, c: Any, op: Callable) -> TensorHandle:
        return (method if op is np.where else arithmetic)(self, a, b, c, op)

    return call


def _refused(name: str, method: Callable) -> Callable:
    def call(*operands: Any) -> Any:
        for x in operands:
            for each in x if isinstance(x, tuple | list) else (x,):
                if _is_bf16(getattr(each, "handle", each)):
                    raise NotImplementedError(f"{name} of bfloat16: the interpreter would do it with its bits")
        return method(*operands)

    return call


def _by_name(np_dtype: Callable) -> Callable:
    """The interpreter's function from a type of Triton's to one of NumPy's, which makes its table anew each time."""
    known = {}

    def of(type: Any) -> np.dtype:
        if type.name not in known:
            known[type.name] = np_dtype(type)
        return known[type.name]

    return of


# ---- memory --------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    name: str
    first: int
    end: int


_arguments: list[_Span] = []  # of the kernel that runs
_asked: dict[int, _Span] = {}  # whose address a launcher asked for


def _span(name: str, x: Tensor) -> _Span:
    """All that x's storage holds: a kernel may be given a view for its address."""
    storage = x.untyped_storage()
    first = torch._C.TensorBase.data_ptr(x) - x.storage_offset() * x.element_size()
    return _Span(name, first, first + storage.nbytes())


def _check(what: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
    addresses = np.asarray(pointers.data, np.uint64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    if addresses.size == 0:
        return
    first, last = int(addresses.min()), int(addresses.max())
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    for span in (*_arguments, *_asked.values()):
        if span.first <= first and last + size <= span.end:
            return
    outside = np.ones(addresses.shape, bool)
    for span in (*_arguments, *_asked.values()):
        outside &= (addresses < span.first) | (addresses + np.uint64(size) > span.end)
    if not outside.any():
        return
    wrong = int(addresses[outside].flat[0])
    near = min(_arguments, key=lambda span: max(span.first - wrong, wrong - span.end))
    raise IndexError(
        f"{what} out of bounds, {int(outside.sum())} of {addresses.size}: {wrong - near.first} bytes from the first of "
        f"{near.name}, which has {near.end - near.first}"
    )


def _checked(what: str, method: Callable, mask_at: int | None, pointers_at: int = 0) -> Callable:
    def call(self: InterpreterBuilder, *operands: Any, **options: Any) -> Any:
        _check(what, operands[pointers_at], None if mask_at is None else operands[mask_at])
        return method(self, *operands, **options)

    return call


# ---- launches ------------------------------------------------------------------------------------------------------

_most = [0]  # programs of a launch that are interpreted; 0 is no bound


def _launched(method: Callable) -> Callable:
    """GridExecutor's call, which knows what the kernel is given."""

    def call(self: Any, *arguments: Any, **constants: Any) -> None:
        programs = math.prod(self.grid) if isinstance(self.grid, tuple) else 0
        if 0 < _most[0] < programs:
            pytest.skip(f"a launch of {programs} programs is left to a real GPU")
        given = zip((*self.arg_names, *constants), (*arguments, *constants.values()), strict=False)
        before = _arguments[:]
        _arguments[:] = [_span(name, x) for name, x in given if isinstance(x, Tensor)]
        try:
            with np.errstate(all="ignore"):  # a GPU says nothing of 0 / 0 either
                method(self, *arguments, **constants)
        except its.InterpreterError as error:
            raise _origin(error) from None
        finally:
            _arguments[:] = before

    return call


def _origin(error: BaseException) -> BaseException:
    """What a kernel has run into; the interpreter wraps it once for every function that was called."""
    while isinstance(error, its.InterpreterError) and error.__cause__:
        error = error.__cause__
    return error


class _Kept:
    """In place of the interpreter's patches of triton.language, which it makes anew for each call of a function."""

    def __init__(self, patch: Callable) -> None:
        self._patch, self._done = patch, {}

    def __call__(self, function: Callable) -> "_Kept":
        languages = tuple(id(each) for each in function.__globals__.values() if each is tl or each is tl.core)
        if languages not in self._done:
            self._done[languages] = self._patch(function)
        return self

    def restore(self) -> None:
        """Later, by `end`."""

    def end(self) -> None:
        for scope in reversed(self._done.values()):
            scope.restore()


def _asking(method: Callable) -> Callable:
    def data_ptr(x: Tensor) -> int:
        address = method(x)
        _asked[address] = _span("a tensor in a table", x)
        return address

    return data_ptr


@contextlib.contextmanager
def installed(most: int = 0) -> Iterator[None]:
    """Within the block kernels are interpreted as described above.

    Args:
        most: a launch of more programs skips its test; 0 for no bound.
    """
    builder = InterpreterBuilder
    patches = {
        "binary_op": _in_float32(builder.binary_op),
        "unary_op": _in_float32(builder.unary_op),
        "ternary_op": _select(builder.ternary_op),
        "create_fma": _in_float32(builder.create_fma),
        "create_dot": _in_float32(builder.create_dot),
        "create_erf": _in_float32(builder.create_erf),
        "create_rsqrt": _in_float32(builder.create_rsqrt),
        "cast_impl": _cast(builder.cast_impl),
        "create_fp_to_fp": _cast(builder.create_fp_to_fp),
        "create_masked_load": _checked("a load", builder.create_masked_load, 1),
        "create_masked_store": _checked("a store", builder.create_masked_store, 2),
        "create_atomic_rmw": _refused("an atomic", _checked("an atomic", builder.create_atomic_rmw, 3, 1)),
        "create_atomic_cas": _refused("an atomic", _checked("an atomic", builder.create_atomic_cas, None)),
    }
    reduce, options = its.ReduceScanOpInterface.apply, its.interpreter_builder.options
    options = dataclasses.replace(options, sanitize_overflow=False)
    with contextlib.ExitStack() as stack:
        for name, method in patches.items():
            stack.enter_context(mock.patch.object(builder, name, method))
        stack.enter_context(mock.patch.object(its.interpreter_builder, "options", options))
        stack.enter_context(mock.patch.object(its, "_get_np_dtype", _by_name(its._get_np_dtype)))
        patches = _Kept(its._patch_lang)
        stack.callback(patches.end)
        stack.enter_context(mock.patch.object(its, "_patch_lang", patches))
        stack.enter_context(mock.patch.object(its.ReduceScanOpInterface, "apply", _refused("a reduction", reduce)))
        stack.enter_context(mock.patch.object(its.GridExecutor, "__call__", _launched(its.GridExecutor.__call__)))
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", _asking(Tensor.data_ptr)))
        before, _most[0] = _most[0], most
        try:
            yield
        finally:
            _most[0] = before
            _asked.clear()
