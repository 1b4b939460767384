"""Gradients between processes: their sums, or only the rows of them that a step will apply."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.optim.accumulate import AddedGradients
from fastbert.optim.gradients import check_integers, named_rows, read, row_ids, sparse

BUCKET = 25 << 20  # bytes, as DistributedDataParallel's


class SummedGradients:
    """Adds up the gradients of all processes, most of them while backward still computes the others.

        summed = SummedGradients(model.parameters())
        for batch in micro_batches[:-1]:
            loss(model(batch)).backward()
        with summed.exchange():
            loss(model(micro_batches[-1])).backward()
        # every gradient is now the sum over all processes

    What DistributedDataParallel does, with a sum in place of its mean, around a model that stays as it is. Gradients
    travel in buckets, in the order in which backward makes them, which the first exchange learns; each becomes a view
    of its bucket. All processes get the same bits, and the same ones again from the same gradients. With gradients on a
    GPU nothing waits for it, and the exchange can be captured together with the step.

    Args:
        params: the same in every process. Those without a gradient are left out, in all processes alike.
        group: the process group; None for the default one.
        bucket: bytes from which a bucket is full.
        added: has the sums of the passes before, which are added to a bucket by lists, where autograd adds one
            parameter after the other.

    Raises:
        TypeError: a gradient that is not dense, when `exchange` ends.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        group: dist.ProcessGroup | None = None,
        bucket: int = BUCKET,
        added: AddedGradients | None = None,
    ) -> None:
        self._params, self._group, self._size, self._added = list(params), group, bucket, added
        self._buckets: list[list[Tensor]] = []
        self._number_of: dict[Tensor, int] = {}  # of a parameter's bucket
        self._is_open = False
        for param in (param for param in self._params if param.requires_grad):
            param.register_post_accumulate_grad_hook(self._arrive)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Around the backward pass that completes a step's gradients: when the block ends they are the sums."""
        self._arrived: list[Tensor] = []
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, dist.Work]] = []  # one for each bucket, in their order
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
        self._buckets = self._buckets[: len(self._sent)]
        if self._added is not None:
            self._added.complete()
        sent = set(itertools.chain(*self._buckets))
        rest = (p for p in (*self._arrived, *self._params) if p.grad is not None and p not in sent)
        for bucket in _in_buckets(list(dict.fromkeys(rest)), self._size):
            self._buckets.append(bucket)
            self._send(bucket)
        self._number_of = {param: number for number, bucket in enumerate(self._buckets) for param in bucket}
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            for param, its in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                param.grad = its.view_as(param)

    def _arrive(self, param: Tensor) -> None:
        """Its gradient is there; buckets leave in their order, so that it is the same in all processes."""
        if not self._is_open:
            return
        self._arrived.append(param)
        if param in self._number_of:
            self._missing[self._number_of[param]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            bucket = self._buckets[len(self._sent)]
            if self._added is not None:
                self._added.complete(bucket)
            self._send(bucket)

    def _send(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([param.grad.reshape(-1) for param in bucket])
        for param in bucket:
            param.grad = None  # its memory is free while the sum travels
        self._sent.append((flat, dist.all_reduce(flat, group=self._group, async_op=True)))


def _in_buckets(params: Iterable[Tensor], size: int) -> list[list[Tensor]]:
    """Neighbours of one dtype and device together, until they have `size` bytes."""
    buckets, last, room = [], None, 0
    for param in params:
        if param.grad.layout is not torch.strided:
            raise TypeError(
                f"SummedGradients adds up dense gradients, got a {param.grad.layout} one of shape {list(param.shape)}: "
                "leave that parameter out, and exchange it by all_gather_rows"
            )
        kind = param.grad.dtype, param.grad.device
        if kind != last or room <= 0:
            buckets.append([])
            last, room = kind, size
        buckets[-1].append(param)
        room -= param.grad.nbytes
    return buckets


def sum_rows(param: Tensor, ids: Tensor, *, fixed_size: bool = False, group: dist.ProcessGroup | None = None) -> None:
    """Adds up the named rows of a dense gradient over all processes; its other rows are left as they are.

    For a table of which `LazyAdam.step(rows={param: ids})` applies these rows alone: they travel, not the table. A word
    embedding that also decodes is such a table: its gradient has something in every row, and a step applies the rows of
    the words in its batches.

    Args:
        param: its gradient is dense.
        ids: rows, the same in all processes and in the same order: `all_gather_ids` gives them. Any number of times
            each.
        fixed_size: send as many rows as there are ids, or all where these are fewer, however many different ones there
            are: nothing waits for a GPU, and the exchange can be captured. Otherwise each row travels once.
        group: the process group; None for the default one.

    Raises:
        TypeError, ValueError: no dense gradient; ids that are no integers or, on a CPU, no rows.
    """
    grad = param.grad
    if grad is None or grad.layout is not torch.strided:
        raise TypeError(f"sum_rows takes a dense gradient, got {None if grad is None else grad.layout}")
    ids = row_ids(ids, param)
    with torch.no_grad():
        if fixed_size:
            ids = named_rows(ids, len(grad)).argsort(descending=True, stable=True)[: len(ids)]
        else:
            ids = ids.unique()
        if len(ids) == len(grad):
            dist.all_reduce(grad, group=group)
            return
        values = grad.index_select(0, ids)
        dist.all_reduce(values, group=group)
        grad.index_copy_(0, ids, values)


def all_gather_rows(
    param: Tensor, *, average: bool = True, same_size: bool = False, group: dist.ProcessGroup | None = None
) -> None:
    """Gives every process the sparse gradient rows of all, instead of the whole table: n * D numbers, not V * D.

    For a parameter outside DDP's own exchange (`DistributedDataParallel._set_params_and_buffers_to_ignore_for_model`),
    called by every process between backward and the optimizer's step. `param.grad` becomes the rows of all processes in
    the order of their ranks, not coalesced, so that every process takes the same step, bit for bit. Works on every
    backend of torch.distributed that has all_gather, which NCCL's sparse all-reduce has not.
    With `missed="replay"` see `all_gather_ids`.

    Args:
        param: its grad is sparse COO with one sparse axis, or None for no rows from this process.
        average: divide by the number of processes, as DDP does; False: the sum.
        same_size: every process has as many rows, as batches of one shape give them: then nothing waits for a GPU.
        group: the process group; None for the default one.

    Raises:
        TypeError: a dense gradient. ValueError: more than one sparse axis.
    """
    gradient = None if param.grad is None else read(param, {})
    if gradient is not None and gradient.rows is None:
        raise TypeError(
            "all_gather_rows takes a sparse gradient (nn.Embedding(sparse=True)), got a dense one: let DDP reduce it"
        )
    with torch.no_grad():
        if gradient is None:
            rows = torch.empty(0, dtype=torch.int64, device=param.device)
            values = param.new_empty(0, *param.shape[1:])
        else:
            rows, values = gradient.rows, gradient.values
        sizes = _all_sizes(rows, same_size, group)
        rows, values = (_all_gather(x, sizes, group) for x in (rows, values))
        param.grad = sparse(param, rows.unsqueeze(0), values / len(sizes) if average else values, False)


def all_gather_ids(ids: Tensor, *, same_size: bool = False, group: dist.ProcessGroup | None = None) -> Tensor:
    """The row ids of all processes, for a table whose gradient they share.

    Under DistributedDataParallel every process has the same dense gradient, averaged over all, but its own batch. Were
    each to name the rows of its own batch, each would move other rows, and the tables would part without a word. With
    the ids of all of them every process takes the same step, bit for bit:

        model = DistributedDataParallel(net)  # net.embedding is an nn.Embedding with a dense gradient
        optimizer = fastbert.LazyAdam(model.parameters())
        weight = net.embedding.weight
        for ids, labels in batches:  # each process its own
            rows = {weight: fastbert.all_gather_ids(ids)}
            optimizer.catch_up(weight, rows[weight])  # for missed="replay", before the forward pass
            loss(model(ids), labels).backward()
            fastbert.clip_grad_norm_(model.parameters(), 1.0, rows=rows)
            optimizer.step(rows=rows)
            optimizer.zero_grad()

    With `missed="replay"` the rows that another process reads must be brought up to date here too, because its gradient
    for them is applied here: `catch_up` with the ids of all, whether gradients are then exchanged by DDP or by
    `all_gather_rows`. A process that does not raises at the step. Where one process alone reads rows for another
    purpose, such as evaluation, call `optimizer.flush()` in all of them first: rows brought in two goes are rounded
    otherwise than rows brought in one.

    Called by every process of the group.

    Args:
        ids: of any shape and integer type, on a device that the group's backend exchanges. May be empty.
        same_size: every process has as many, as batches of one shape give them: then nothing waits for a GPU.
        group: the process group; None for the default one.

    Returns:
        int64 [n], the ids of all processes in the order of their ranks, duplicates kept.

    Raises:
        TypeError: ids that are not an integer tensor.
    """
    check_integers(ids)
    ids = ids.detach().reshape(-1).to(torch.int64)
    return _all_gather(ids, _all_sizes(ids, same_size, group), group)


def _all_sizes(x: Tensor, same_size: bool, group: dist.ProcessGroup | None) -> list[int]:
    """Length of the first axis in every process."""
    if same_size:
        return [len(x)] * dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group=group)
    return [int(count) for count in counts]


def _all_gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The processes' x, of `sizes` rows each, one after the other."""
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
