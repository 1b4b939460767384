"""Gradients between two processes: rows and ids gathered, dense ones summed, parameters split by rows."""

import gc
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastbert import LazyAdam, SummedGradients, all_gather_ids, all_gather_rows, clip_grad_norm_, sum_rows
from fastbert.optim.accumulate import AddedGradients

V, D, STEPS = 50, 4, 12
EXCHANGES = ["rows", "sum", "ddp", "ids", "replay rows", "replay ids"]


def ids_of(rank, step):
    """Row 7 is in both processes at the first step; the second process has none at the second."""
    if step < 2:
        return torch.tensor([[[1, 7, 7], [2, 9]], [[7, 30], []]][rank][step], dtype=torch.int64)
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (V * torch.rand(3, generator=generator) ** 3).long()


def build(exchange):
    torch.manual_seed(0)
    dense = exchange in ("ids", "replay ids", "dense AdamW")
    return nn.Embedding(V, D, sparse=not dense), torch.randn(V, D)


def options_of(exchange):
    return {"lr": 0.1, "weight_decay": 0.1, "missed": "replay" if "replay" in exchange else "leave"}


def train(exchange, rank, steps=STEPS):
    """Run in each of two processes. The table and its gradient after some steps."""
    table, target = build(exchange)
    weight = table.weight
    model = DistributedDataParallel(table) if exchange in ("ddp", "ids", "replay ids") else table
    optimizer = LazyAdam(model.parameters(), **options_of(exchange))
    optimizer.attach(table)
    for step in range(steps):
        optimizer.zero_grad()
        ids, rows = ids_of(rank, step), None
        if exchange.startswith("replay") or exchange == "ids":
            rows = {weight: all_gather_ids(ids)}
            optimizer.catch_up(weight, rows[weight])
        if len(ids) or model is not table:
            (model(ids) * target[ids]).sum().backward()
        if exchange in ("rows", "sum", "replay rows", "forgotten replay"):
            all_gather_rows(weight, average=exchange != "sum")
        optimizer.step(rows=rows if "ids" in exchange else None)
    grad, stood = weight.grad, weight.detach().clone()
    optimizer.zero_grad()
    optimizer.flush()
    return stood, weight.detach(), grad.coalesce() if grad.is_sparse else grad


def run(folder):
    """In each of two processes: every exchange in turn."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {exchange: train(exchange, rank) for exchange in EXCHANGES}
    try:
        train("forgotten replay", rank, steps=2)  # the second process does not bring the rows of the first
    except RuntimeError as error:
        results["forgotten"] = str(error)
    results["summed"], results["added"] = (summed(rank, is_added) for is_added in (False, True))
    results["some rows"] = [some_rows(rank, fixed_size) for fixed_size in (False, True)]
    results["split"] = {name: split(rank, options, rows) for name, (options, rows) in SPLIT.items()}
    ids = torch.arange(3 * rank, dtype=torch.uint8).view(3, rank)
    results["gathered"] = all_gather_ids(ids)
    results["as many"] = all_gather_ids(torch.tensor([rank, 5]), same_size=True)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    # A wrapper freed after the group frees the group in turn, holding the interpreter's lock, and gloo's thread may
    # wait for that lock while it is joined: seen to hang with torch 2.13. They were freed with the calls above.
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each of the two processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, folder],
            env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in processes:  # the other one waits for it
            process.kill()
            process.wait()
            process.stderr.close()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_two_processes_step_as_one(exchange, results):
    """One process with the rows of both: LazyAdam, or dense AdamW where missed steps are made up for."""
    (stood, ours, grad), (other_stood, theirs, _) = (result[exchange] for result in results)
    assert torch.equal(stood, other_stood) and torch.equal(ours, theirs), "the processes parted"

    share = 1.0 if exchange == "sum" else 0.5
    is_adamw = "replay" in exchange
    table, target = build("dense AdamW" if is_adamw else exchange)
    if is_adamw:
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    else:
        optimizer = LazyAdam(table.parameters(), **options_of(exchange))
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = torch.cat([ids_of(rank, step) for rank in range(2)])
        (table(ids) * target[ids] * share).sum().backward()
        optimizer.step(**({"rows": {table.weight: ids}} if exchange == "ids" else {}))
    torch.testing.assert_close(ours, table.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.to_dense(), table.weight.grad.to_dense())
    assert is_adamw == (not torch.equal(stood, ours)), "rows should have waited"


def test_rows_of_other_processes_that_were_not_brought_are_refused(results):
    assert "forgotten" not in results[0]
    assert "with fastbert.all_gather_ids(ids) where processes exchange their rows" in results[1]["forgotten"]


def test_ids_are_gathered_in_the_order_of_ranks(results):
    assert all(result["gathered"].tolist() == [0, 1, 2] for result in results)
    assert all(result["as many"].tolist() == [0, 5, 1, 5] for result in results)
    with pytest.raises(TypeError, match="rows must be an integer tensor"):
        all_gather_ids(torch.tensor([0.5]))


def test_all_gather_rows_refuses_a_dense_gradient():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    with pytest.raises(TypeError, match="takes a sparse gradient"):
        all_gather_rows(param)


# ---- sums of dense gradients ---------------------------------------------------------------------------------------


def summed(rank, is_added):
    """Three steps of two micro-batches each, in buckets of two weights; the last step has another parameter frozen, and
    in the second one the first layer has a gradient of the first micro-batch alone."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    added = AddedGradients(net.parameters()) if is_added else None
    gradients, found = SummedGradients(net.parameters(), bucket=48, added=added), []
    for step in range(3):
        net[1].requires_grad_(step < 2)
        net.zero_grad()
        loss(net, rank, step, 0).backward()
        if is_added:
            added.take()
        with gradients.exchange():
            loss(net, rank, step, 1).backward()
        found += [[None if param.grad is None else param.grad.clone() for param in net.parameters()]]
    return found, [len(bucket) for bucket in gradients._buckets]


def loss(net, rank, step, micro):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * rank + 10 * step + micro))
    return (net[1:] if (step, micro) == (1, 1) else net)(x).square().sum()


@pytest.mark.parametrize("way", ["summed", "added"])
def test_gradients_are_those_of_all_batches(results, way):
    """Of two micro-batches, which autograd adds up, or lists of gradients do."""
    (ours, buckets), (theirs, _) = (result[way] for result in results)
    assert buckets == [2, 2, 2], "36 bytes of a weight and 12 of a bias"
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    for step in range(3):
        net[1].requires_grad_(step < 2)
        net.zero_grad()
        for rank in range(2):
            for micro in range(2):
                loss(net, rank, step, micro).backward()
        for param, one, other in zip(net.parameters(), ours[step], theirs[step], strict=True):
            if param.requires_grad:
                assert torch.equal(one, other)
                torch.testing.assert_close(one, param.grad)
            else:
                assert one is other is None


def test_sums_refuse_a_sparse_gradient():
    table = nn.Embedding(5, 2, sparse=True)
    says = pytest.raises(TypeError, match=r"got a torch\.sparse_coo one of shape \[5, 2\]: leave that parameter out")
    with says, SummedGradients(table.parameters()).exchange():
        table(torch.tensor([1])).sum().backward()


def some_rows(rank, fixed_size):
    param = nn.Parameter(torch.zeros(6, 2))
    param.grad = torch.full((6, 2), 10.0**rank) * torch.arange(6.0).unsqueeze(1)
    sum_rows(param, all_gather_ids(torch.tensor([4, 4 - rank])), fixed_size=fixed_size)
    return param.grad[:, 0].tolist()


def test_the_named_rows_alone_are_summed(results):
    """Rows 3 and 4; with a fixed size four rows travel, these and the first two besides."""
    exact, fixed = zip(*(result["some rows"] for result in results), strict=True)
    assert exact == ([0, 1, 2, 33, 44, 5], [0, 10, 20, 33, 44, 50])
    assert fixed == ([0, 11, 2, 33, 44, 5], [0, 11, 20, 33, 44, 50])


# ---- parameters split by rows -------------------------------------------------------------------------------------

ROWS = [0, 2, 2], [6, 3]  # of each process, of the table of 7, whose first four are the first process's
SPLIT = {
    "dense": ({"weight_decay": 0.1, "amsgrad": True}, False),
    "rows": ({"weight_decay": 0.1, "bias_correction": "row", "padding_idx": 3}, True),
    "row_wise": ({"row_wise": True, "lazy": "nonzero"}, False),
}


def split_table():
    torch.manual_seed(1)
    table, vector = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(1))
    return table, vector, [torch.randn(7, 3) * (torch.arange(7) % 3 > 0).unsqueeze(1) for _ in range(3)]


def optimizer_of(table, vector, options):
    return LazyAdam([{"params": [table], **options}, {"params": [vector]}], lr=0.1)


def split(rank, options, named):
    """Three clipped steps of a table and a vector of one element, which the second process has nothing of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    table, vector, gradients = split_table()
    table, vector = (nn.Parameter(distribute_tensor(x.detach(), mesh, [Shard(0)])) for x in (table, vector))
    optimizer = optimizer_of(table, vector, options)
    norms = []
    for grad in gradients:
        table.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        vector.grad = distribute_tensor(torch.ones(1), mesh, [Shard(0)])
        rows = {table: all_gather_ids(torch.tensor(ROWS[rank]))} if named else None
        norms += [clip_grad_norm_([table, vector], 1.0, rows=rows)]
        optimizer.step(rows=rows)
    restored = optimizer_of(table, vector, options)
    restored.load_state_dict(optimizer.state_dict())
    state = {name: x.full_tensor() for name, x in restored.state[table].items() if name != "step"}
    return table.full_tensor(), vector.full_tensor(), norms, state


@pytest.mark.parametrize("name", SPLIT)
def test_split_parameters_step_as_whole_ones(results, name):
    options, named = SPLIT[name]
    table, vector, gradients = split_table()
    optimizer = optimizer_of(table, vector, options)
    norms = []
    for grad in gradients:
        table.grad, vector.grad = grad.clone(), torch.ones(1)
        rows = {table: torch.tensor([0, 2, 2, 6, 3])} if named else None
        norms += [clip_grad_norm_([table, vector], 1.0, rows=rows)]
        optimizer.step(rows=rows)
    state = {name: x for name, x in optimizer.state[table].items() if name != "step"}
    for result in results:
        torch.testing.assert_close(result["split"][name], (table.data, vector.data, norms, state))


if __name__ == "__main__":
    run(sys.argv[1])
