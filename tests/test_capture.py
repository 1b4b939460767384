"""A captured step's way to its graph, with CUDA's streams, events and graphs played by stand-ins.

What a stream is given runs as late as it may, when something waits for it, or as soon, before anything that it does not
wait for: a batch that is overwritten too early, or read before it is there, shows as a wrong number. tests/test_gpu.py
has the real ones.
"""

import contextlib
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import fastbert
from fastbert.capture import ALIGNMENT, Layout

module = import_module("fastbert.capture")  # `fastbert.capture` is the function of that name


class Batch(NamedTuple):
    ids: torch.Tensor
    longest: int
    factor: torch.Tensor


def batch(number, size=3, longest=7):
    return [Batch(torch.arange(size) + number, longest, torch.tensor(float(number)))], {
        "lr": torch.tensor([0.5 * number])
    }


def step(inputs):
    (one,), others = inputs
    return one.ids.double().sum() * one.factor + others["lr"]


class Stream:
    """Work lies in a queue until somebody waits for it."""

    def __init__(self):
        self.queue = []

    def run(self):
        while self.queue:
            self.queue.pop(0)()

    def wait_event(self, event):
        if event.latest is not None:
            self.queue.append(event.latest.wait)  # a later record is another one's

    def wait_stream(self, other):
        self.queue.append(Record(other).wait)


class Record:
    """A place in a stream's queue."""

    def __init__(self, stream):
        self.stream, self.is_reached = stream, False
        stream.queue.append(self.reach)

    def reach(self):
        self.is_reached = True

    def wait(self):
        while not self.is_reached:
            self.stream.queue.pop(0)()


class Event:
    latest = None

    def record(self):
        self.latest = Record(Cuda.current)

    def synchronize(self):
        if self.latest is not None:
            self.latest.wait()


class Cuda:
    current, at_once = Stream(), False  # whether streams beside the current one run as soon as they may
    Stream, Event, device = Stream, Event, staticmethod(lambda _: contextlib.nullcontext())
    is_available = staticmethod(lambda: True)

    @staticmethod
    def current_stream():
        return Cuda.current

    @staticmethod
    @contextlib.contextmanager
    def stream(stream):
        before, Cuda.current = Cuda.current, stream
        try:
            yield
        finally:
            Cuda.current = before
        if Cuda.at_once:
            stream.run()

    @staticmethod
    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        Cuda.capturing, graph.kernels = graph, []
        before, Cuda.current = Cuda.current, stream
        try:
            yield
        except BaseException:  # as torch does: the stream stays, and another error comes
            raise RuntimeError("operation failed due to a previous error during capture") from None
        finally:
            Cuda.capturing = None
        Cuda.current = before

    class CUDAGraph:
        def replay(self):
            Cuda.current.queue += self.kernels

    capturing = None


class OnGPU(torch.Tensor):
    """Memory of the stand-in: what is copied into it is copied when its stream comes to it."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            target, source = (x.as_subclass(torch.Tensor) if isinstance(x, OnGPU) else x for x in args[:2])
            Cuda.current.queue.append(lambda: target.copy_(source))
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


def late(function):
    """A step whose kernels run when their stream, or a graph's replay, comes to them."""

    def call(inputs):
        plain = torch.utils._pytree.tree_map(
            lambda x: x.as_subclass(torch.Tensor) if isinstance(x, OnGPU) else x, inputs
        )
        result = torch.zeros(1, dtype=torch.float64)
        kernels = Cuda.current.queue if Cuda.capturing is None else Cuda.capturing.kernels
        kernels.append(lambda: result.copy_(function(plain)))
        return result

    return call


@contextlib.contextmanager
def without_a_gpu(at_once):
    def empty(*shape, device=None, pin_memory=False, **named):
        made = torch.empty(*shape, **named)
        return made if pin_memory else made.as_subclass(OnGPU)

    stand_in = SimpleNamespace(**{name: getattr(torch, name) for name in ("Tensor", "device", "uint8", "empty_like")})
    stand_in.empty, stand_in.cuda, stand_in.OutOfMemoryError = empty, Cuda, torch.OutOfMemoryError
    Cuda.current, Cuda.at_once = Stream(), at_once
    with mock.patch.object(module, "torch", stand_in):
        yield


@pytest.mark.parametrize("warmup", [2, 3, None])
@pytest.mark.parametrize("is_waited_for", [True, False])
@pytest.mark.parametrize("at_once", [True, False], ids=["soon", "late"])
def test_every_call_is_one_step_of_its_batch(warmup, is_waited_for, at_once):
    with without_a_gpu(at_once):
        captured = fastbert.capture(late(step), batch(1), warmup=warmup)
        results = []
        for number in range(8):
            inputs = batch(number)
            result = captured(inputs)
            for x in (inputs[0][0].ids, inputs[0][0].factor, inputs[1]["lr"]):
                x.fill_(99)  # the caller's memory is its own again
            kept = torch.zeros(1, dtype=torch.float64)
            Cuda.current.queue.append(lambda result=result, kept=kept: kept.copy_(result))
            results.append(kept)
            if is_waited_for:
                Cuda.current.run()
        Cuda.current.run()
        assert [x.item() for x in results] == [step(batch(number)).item() for number in range(8)]


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("operation not permitted"), "must not wait for the device.* use another stream. operation not"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (KeyboardInterrupt("Ctrl-C"), "Ctrl-C"),
    ],
    ids=["a wait", "memory", "interrupted"],
)
def test_a_capture_that_fails_says_of_what(error, expected):
    """Torch cannot always end it and raises another error then; the stream of the caller is set back."""

    def fails(inputs):
        if Cuda.capturing is not None:
            raise error

    with without_a_gpu(at_once=False):
        captured, stream = fastbert.capture(fails, batch(1), warmup=2), Cuda.current
        captured(batch(1)), captured(batch(2))
        with pytest.raises(type(error), match=expected):
            captured(batch(3))
        assert Cuda.current is stream
        with pytest.raises(RuntimeError, match="the capture of this step has failed"):
            captured(batch(4))


def test_a_batch_unlike_the_example_is_refused():
    layout = Layout(batch(1))
    with pytest.raises(ValueError, match=r"entry 0 must be torch.int64 \[3\], got torch.int64 \[4\]"):
        layout.tensors_of(batch(1, size=4))
    with pytest.raises(ValueError, match=r"entry 1 must be 7, got 8"):
        layout.tensors_of(batch(1, longest=8))
    with pytest.raises(ValueError, match="like its example: expected"):
        layout.tensors_of(batch(1)[:1])
    with pytest.raises(ValueError, match="no tensor"):
        Layout({"lr": 0.1})
    assert layout.bytes == 3 * ALIGNMENT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="call the step as it is"):
        fastbert.capture(step, batch(1))
