"""A training step captured whole as a CUDA graph, and replayed: its kernels follow each other, no Python between them.

Launching a step of a BERT base from Python takes longer than a large GPU takes to compute it. A graph is launched in
one go; all of its sizes, addresses and numbers of the host are those of the step that was captured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

ALIGNMENT = 256  # bytes; kernels read 16 at once
WARMUP = 3


def capture(
    step: Callable[[Any], Any], example: Any, *, warmup: int | None = WARMUP, device: torch.device | str | None = None
) -> "Captured":
    """Makes a step on a GPU one CUDA graph.

        model = fastbert.BertForPreTraining(config).cuda()
        optimizer = fastbert.LazyAdam(model.parameters())

        def step(batch):  # forward, backward, clipping and the optimizer's step; returns tensors
            for group in optimizer.param_groups:
                group["lr"] = batch["lr"]  # what changes from step to step is a tensor of the batch
            loss = model(**batch["inputs"]).loss
            loss.backward()
            norm, factor = optimizer.clip_factor(1.0)
            optimizer.step(grad_factor=factor)
            optimizer.zero_grad()
            return loss.detach()

        captured = fastbert.capture(step, first_batch)
        for batch in batches:  # tensors on the CPU, of the shapes of the first
            loss = captured(batch)  # overwritten by the next call: float(loss), or loss.clone()

    The first calls run the step as it is, on a stream of their own; then it is captured, which computes nothing, and
    replayed from there on. So every call is one step, and results are those of `step` itself, bit for bit, dropout's
    random numbers too. A batch is copied to the GPU by a second stream, while the step before it runs.

    A step must not wait for the device (`.item()`, `print(loss)`, a bool index, moving a tensor), and what it does on
    the host (a number that it counts, a print) happens at its capture alone: learning rates and counts are tensors, of
    the batch or on the device. LazyAdam counts its steps there.

    The graph reads and writes the tensors that the step had, where they lay: load weights and the optimizer's state in
    place, as `load_state_dict` of modules and of LazyAdam does, and capture anew after adding a parameter. A loss of an
    earlier step that is still there with its graph ties autograd to that step's stream: `del` it before.

    Args:
        step: takes a batch, its tensors on the GPU and always the same memory; returns tensors, or a tree of them.
        example: a batch: tensors in any nesting of tuples, lists and dicts, and what else the step takes. Only its
            structure, shapes, dtypes and numbers are looked at. Those of every batch must be the same.
        warmup: calls before the capture, 2 or more: optimizers make their state in the first. None never captures; all
            else is the same, for debugging.
        device: the GPU; None is the current one.

    Returns:
        A function of a batch, which gives what `step` returned, in memory that the next call writes again.

    Raises:
        RuntimeError: there is no GPU; or, at the call that captures, `step` does what cannot be captured, and at any
            call after one whose capture failed, of whatever cause: gradients then hold no numbers.
        torch.OutOfMemoryError: at the call that captures, whatever else went wrong because of it.
        ValueError: `example` holds no tensor, or `warmup` is less than 2; at a call, a batch that is not like it.
    """
    return Captured(step, example, warmup, torch.device("cuda" if device is None else device))


class Captured:
    """What `capture` returns."""

    def __init__(self, step: Callable[[Any], Any], example: Any, warmup: int | None, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(
                f"a step is captured on an NVIDIA GPU, and {device} is none that torch has here: call the step as it is"
            )
        if warmup is not None and warmup < 2:
            raise ValueError(f"warmup is how many calls come before the capture: expected 2 or more, got {warmup}")
        self._step, self._warmup, self._calls = step, warmup, 0
        self._layout = Layout(example)
        self._inputs = torch.empty(self._layout.bytes, dtype=torch.uint8, device=device)  # what the graph reads
        self._batch = self._layout.batch_in(self._inputs)
        self._staged = torch.empty_like(self._inputs)  # the next batch
        self._pinned = [
            torch.empty(self._layout.bytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)
        ]
        with torch.cuda.device(device):
            self._running, self._copying = torch.cuda.Stream(), torch.cuda.Stream()
            self._copied = [torch.cuda.Event() for _ in range(2)]  # of each pinned memory: it may be written again
            self._taken = torch.cuda.Event()  # what was staged is in the inputs
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None
        self._has_failed = False

    def __call__(self, batch: Any) -> Any:
        if self._has_failed:
            raise RuntimeError(
                "the capture of this step has failed, and gradients that it left hold no numbers: begin anew, in a new "
                "process, as torch often captures nothing more in this one. warmup=None takes the step as it is"
            )
        with torch.cuda.device(self._device):
            self._bring(batch)
            self._calls += 1
            if self._warmup is None or self._calls <= self._warmup:
                return self._run()
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()
        return self._result

    def _bring(self, batch: Any) -> None:
        """Puts the batch where the step reads it, behind the step before, whose end only the GPU waits for."""
        tensors, slot = self._layout.tensors_of(batch), self._calls % 2
        current = torch.cuda.current_stream()
        self._copied[slot].synchronize()  # two calls ago: the host may be so far ahead
        for place, x in zip(self._layout.views(self._pinned[slot]), tensors, strict=True):
            if not x.is_cuda:
                place.copy_(x)
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._taken)
            self._staged.copy_(self._pinned[slot], non_blocking=True)
            self._copied[slot].record()
        current.wait_event(self._copied[slot])
        self._inputs.copy_(self._staged)
        self._taken.record()
        for place, x in zip(self._layout.views(self._inputs), tensors, strict=True):
            if x.is_cuda:
                place.copy_(x)

    def _run(self) -> Any:
        """The step as it is, on the stream that it is captured on: there autograd and libraries make what they keep."""
        current = torch.cuda.current_stream()
        self._running.wait_stream(current)
        with torch.cuda.stream(self._running):
            result = self._step(self._batch)
        current.wait_stream(self._running)
        return result

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, of_step = torch.cuda.CUDAGraph(), None
        try:
            # The outer block sets the stream back, which torch does not where a capture cannot be ended.
            with (
                torch.cuda.stream(self._running),
                torch.cuda.graph(graph, stream=self._running, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = self._step(self._batch)
                except BaseException as error:
                    of_step = error
                    raise
        except BaseException as error:
            self._has_failed = True
            cause = of_step or error  # a capture that is broken off cannot always be ended, which says nothing of why
            if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, RuntimeError):
                raise cause from None
            raise RuntimeError(
                "the step cannot be captured: it must not wait for the device (.item(), a bool index, moving a tensor "
                f"to or from the CPU) nor use another stream. {cause}"
            ) from cause
        return graph


class Layout:
    """Where the tensors of batches like `example` lie in one piece of memory, so that one copy brings all."""

    def __init__(self, example: Any) -> None:
        self._leaves, self._spec = tree_flatten(example)
        self._kinds = [_kind(leaf) for leaf in self._leaves]
        self._starts, self.bytes = [], 0
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                self._starts.append(self.bytes)
                self.bytes += leaf.numel() * leaf.element_size()
                self.bytes += -self.bytes % ALIGNMENT
        if not self._starts:
            raise ValueError("the example of a batch holds no tensor, and a captured step reads nothing else anew")
        self._leaves = [torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in self._leaves]

    def tensors_of(self, batch: Any) -> list[Tensor]:
        """Its tensors in order; ValueError where it is not like the example."""
        leaves, spec = tree_flatten(batch)
        if spec != self._spec:
            raise ValueError(f"a captured step takes batches like its example: expected {self._spec}, got {spec}")
        for number, (leaf, expected) in enumerate(zip(leaves, self._kinds, strict=True)):
            if _kind(leaf) != expected:
                raise ValueError(
                    f"a captured step takes batches like its example: entry {number} must be {expected}, got "
                    f"{_kind(leaf)}. Make batches of one shape (padded, with labels that are ignored), and make what "
                    "changes a tensor"
                )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors of a batch that lies in `memory`, uint8 [bytes]."""
        likes = (leaf for leaf in self._leaves if isinstance(leaf, Tensor))
        return [
            memory[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
            for start, like in zip(self._starts, likes, strict=True)
        ]

    def batch_in(self, memory: Tensor) -> Any:
        """The batch that lies there."""
        views = iter(self.views(memory))
        return tree_unflatten([next(views) if isinstance(x, Tensor) else x for x in self._leaves], self._spec)


def _kind(leaf: Any) -> Any:
    """What of a leaf a captured step depends on: of a tensor shape and dtype, of all else the value."""
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf
