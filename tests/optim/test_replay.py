"""`missed="replay"`: LazyAdam at lazy cost on the trajectory of dense AdamW."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from optim_state import bits
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel

from fastbert import LazyAdam
from fastbert.optim import replay
from fastbert.testing import assert_close

V, D = 40, 5
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}


def batch(step):
    """Ids by Zipf's law, so that rows wait for one step or for many, and a loss weight for each."""
    generator = torch.Generator().manual_seed(step)
    ids = (V * torch.rand(6, generator=generator) ** 3).long()
    return ids, torch.randn(6, D, generator=generator, dtype=torch.float64)


def rate(step):
    return 1e-2 * min(1.0, (step + 1) / 20) * (0.5 if step % 7 == 3 else 1.0)


def build(dtype=torch.float32, sparse=True, padding_idx=None, make=LazyAdam, **options):
    torch.manual_seed(0)
    table = nn.Embedding(V, D, sparse=sparse, padding_idx=padding_idx, dtype=torch.float64).to(dtype)
    return table, make(table.parameters(), **{**OPTIONS, **options})


def train(table, optimizer, steps, rows=False):
    for step in steps:
        ids, target = batch(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        (table(ids) * target.to(table.weight.dtype)).sum().backward()
        optimizer.step(**({"rows": {table.weight: ids}} if rows else {}))


@functools.cache
def adamw(dtype, steps, **options):
    """Its table and optimizer after the steps: to be read."""
    table, optimizer = build(dtype, sparse=False, make=torch.optim.AdamW, **options)
    train(table, optimizer, range(steps))
    return table, optimizer


@pytest.mark.parametrize("rows", [False, True], ids=["sparse", "named rows"])
@pytest.mark.parametrize("steps", [1, 3, 60, 150])
def test_is_adamw(best, steps, rows):
    truth, _ = adamw(torch.float64, steps)
    for dtype in (torch.float32, torch.float64) if best == "reference" else (torch.float32,):
        table, optimizer = build(dtype, sparse=not rows, missed="replay")
        optimizer.attach(table)
        train(table, optimizer, range(steps), rows)
        theirs, other = adamw(dtype, steps)
        if steps == 60:
            behind = (optimizer.state[table.weight]["last_step"] < steps).float().mean()
            assert 0.3 < behind < 1, "rows should wait"
        optimizer.flush()
        if dtype == torch.float64:
            torch.testing.assert_close(table.weight, truth.weight, rtol=1e-9, atol=1e-9)
        else:
            assert_close(table.weight.detach(), theirs.weight.detach(), truth.weight.detach())
        mine, yours = optimizer.state[table.weight], other.state[theirs.weight]
        torch.testing.assert_close(mine["exp_avg"], yours["exp_avg"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine["exp_avg_sq"], yours["exp_avg_sq"], rtol=1e-4, atol=1e-7)


def test_a_full_history_and_changed_options(best, monkeypatch):
    """The record is emptied every 16 steps; betas change; dense steps come in between."""
    monkeypatch.setattr(replay, "STEPS", 16)
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    theirs, other = build(sparse=False, make=torch.optim.AdamW)
    for step in range(100):
        for model, stepper in ((table, optimizer), (theirs, other)):
            stepper.param_groups[0]["betas"] = (0.8, 0.99) if step >= 50 else (0.9, 0.999)
            if step % 30 == 29:
                optimizer.catch_up(table.weight)
                stepper.zero_grad()
                model.weight.grad = torch.ones(V, D)
                stepper.step()
            else:
                train(model, stepper, [step])
    optimizer.flush()
    torch.testing.assert_close(table.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_padding_never_moves(best):
    table, optimizer = build(missed="replay", padding_idx=3)
    optimizer.attach(table)
    with torch.no_grad():
        table.weight[3] = 7.0
    train(table, optimizer, range(20))
    optimizer.flush()
    assert (table.weight[3] == 7).all() and not optimizer.state[table.weight]["exp_avg"][3].any()


def test_a_padding_row_that_waits_is_not_stale(best):
    """It never moves, so a dense gradient after steps of all other rows is AdamW's."""
    table = nn.Embedding(3, 2, padding_idx=0)
    optimizer = LazyAdam(table.parameters(), missed="replay")
    optimizer.attach(table)
    for rows in (torch.tensor([1, 2]), torch.tensor([2, 1]), None):
        table.weight.grad = torch.tensor([[0.0], [1.0], [2.0]]).expand(3, 2).clone()
        optimizer.step(rows=None if rows is None else {table.weight: rows})
    assert optimizer.state[table.weight]["step"] == 3


def test_an_exported_model_is_current_and_a_raw_one_is_not(best):
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    train(table, optimizer, range(30))
    last = optimizer.state[table.weight]["last_step"]
    before = table.weight.detach().clone()
    optimizer.state_dict()
    with optimizer.raw():
        assert torch.equal(table.state_dict()["weight"], before)
    assert torch.equal(table.weight, before) and (last < 30).any()
    exported = nn.Sequential(table).state_dict()["0.weight"]
    assert (last == 30).all()
    torch.testing.assert_close(exported, adamw(torch.float32, 30)[0].weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
def test_resumed_is_bitwise_unbroken(best, model_first):
    def fresh():
        table, optimizer = build(missed="replay")
        optimizer.attach(table)
        return table, optimizer

    whole, unbroken = fresh()
    train(whole, unbroken, range(60))

    table, optimizer = fresh()
    train(table, optimizer, range(25))
    file = io.BytesIO()
    with optimizer.raw():
        parts = [("model", table.state_dict()), ("optimizer", optimizer.state_dict())]
    torch.save(dict(parts if model_first else parts[::-1]), file)
    train(table, optimizer, range(90, 95))  # what was saved is not what is alive
    file.seek(0)
    saved = torch.load(file)
    table, optimizer = fresh()
    table.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(table, optimizer, range(25, 60))
    assert torch.equal(table.weight, whole.weight)
    for name, value in unbroken.state[whole.weight].items():
        mine = optimizer.state[table.weight][name]
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def test_flushed_state_goes_on_in_adamw(best):
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    train(table, optimizer, range(30))
    optimizer.flush()
    theirs, other = build(sparse=False, make=torch.optim.AdamW)
    theirs.load_state_dict(table.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(theirs, other, range(30, 50))
    torch.testing.assert_close(theirs.weight, adamw(torch.float32, 50)[0].weight, rtol=1e-5, atol=1e-6)

    # and AdamW's state goes on here
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    theirs, other = adamw(torch.float32, 30)
    table.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(other.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})
    train(table, optimizer, range(30, 50))
    optimizer.flush()
    torch.testing.assert_close(table.weight, adamw(torch.float32, 50)[0].weight, rtol=1e-5, atol=1e-6)


def test_what_would_not_be_adamw_raises(best):
    table, optimizer = build(missed="replay")
    train(table, optimizer, [0])
    with pytest.raises(RuntimeError, match=r"call optimizer.attach\(embedding\) once"):
        train(table, optimizer, range(1, 9))  # not attached: a row is read that missed a step
    tied, optimizer = build(sparse=False, missed="replay")
    optimizer.attach(tied)
    ids = torch.tensor([3, 5])
    (tied.weight @ tied(ids).T).sum().backward()
    before = tied.weight.detach().clone()
    with pytest.raises(ValueError, match="rows that are not named have a gradient"):
        optimizer.step(rows={tied.weight: ids})
    assert torch.equal(tied.weight, before)
    with pytest.raises(ValueError, match="is not this optimizer's"):
        optimizer.attach(nn.Embedding(3, 3))


READS = {  # ways past the attached module, each read as the loss of a step
    "the whole table": lambda table, ids: table.weight.square().sum(),
    "a tied decoder": lambda table, ids: (table(ids) @ table.weight.T).logsumexp(1).sum(),
    "F.embedding": lambda table, ids: F.embedding(ids, table.weight).square().sum(),
    "sparse F.embedding": lambda table, ids: F.embedding(ids, table.weight, sparse=True).square().sum(),
    "indexing": lambda table, ids: table.weight[ids].square().sum(),
}


@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("way", READS)
def test_a_gradient_of_stale_rows_is_refused_and_brought_ones_are_adamw(best, way, named):
    """Row 4 has missed steps; the loss is (what was read - 1) squared, so that its gradient depends on where it was."""
    named, ids = named and "sparse" not in way, torch.tensor([0, 4, 4])
    table, optimizer = build(sparse=False, missed="replay")
    theirs, other = build(sparse=False, make=torch.optim.AdamW)
    optimizer.attach(table)
    for rows in ([0, 4], [0, 1], [1, 2], [2, 3]):
        for model, stepper in ((table, optimizer), (theirs, other)):
            stepper.zero_grad()
            (model(torch.tensor(rows)).sum() - 1).square().backward()
            stepper.step(**({"rows": {table.weight: torch.tensor(rows)}} if stepper is optimizer else {}))

    def loss(model):
        model.weight.grad = None
        return (READS[way](model, ids) - 1).square()

    loss(table).backward()
    before = bits(optimizer, table.weight)
    error = ValueError if named and way in ("the whole table", "a tied decoder") else RuntimeError
    for _ in range(2):
        with pytest.raises(error, match=r"rows that are not named have a gradient|and this gradient is for \d+ that"):
            optimizer.step(rows={table.weight: ids} if named else None)
        assert all(torch.equal(a, b) for a, b in zip(before, bits(optimizer, table.weight), strict=True))
    with pytest.raises(RuntimeError, match=r"computed from rows that were not: call zero_grad\(\)"):
        optimizer.flush()  # too late for this gradient
    if error is ValueError:
        return

    optimizer.zero_grad()
    optimizer.catch_up(table.weight)
    loss(table).backward()
    optimizer.step(rows={table.weight: ids} if named else None)
    loss(theirs).backward()
    theirs.weight.grad = theirs.weight.grad.to_dense()
    other.step()
    optimizer.zero_grad()
    optimizer.flush()
    torch.testing.assert_close(table.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_passes_that_bring_their_rows(best):
    """What a second pass brings has no gradient yet, or stands at the last step: no false alarm, and AdamW's values."""
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    theirs, other = build(sparse=False, make=torch.optim.AdamW)
    for step in range(12):
        for model, stepper in ((table, optimizer), (theirs, other)):
            first, second = (batch(2 * step + i)[0] for i in range(2))
            passes = [model(first).square().sum()]  # a forward pass before zero_grad finds the last step's gradient
            stepper.zero_grad()
            passes[0].backward()
            model(second).sin().sum().backward()
            stepper.step()
    optimizer.zero_grad()
    optimizer.flush()
    torch.testing.assert_close(table.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_missed_steps_end_and_begin_with_the_option(best):
    """Set to "leave", rows are brought once and stay from then on; set to "replay" again, they wait again."""
    table, optimizer = build(missed="replay", weight_decay=0.0)
    optimizer.attach(table)
    train(table, optimizer, range(10))
    group, state = optimizer.param_groups[0], optimizer.state[table.weight]
    expected = adamw(torch.float32, 10, weight_decay=0.0)[0].weight.detach()
    group["missed"] = "leave"
    train(table, optimizer, [10])
    rest = [row for row in range(V) if row not in batch(10)[0]]
    torch.testing.assert_close(table.weight[rest], expected[rest], rtol=1e-5, atol=1e-6)
    assert not {"last_step", "history", "recorded", "recorded_with"} & state.keys()
    before = table.weight.detach().clone()
    optimizer.flush()
    assert torch.equal(table.weight, before)
    group["missed"] = "replay"
    train(table, optimizer, [11])
    assert set(optimizer.state[table.weight]["last_step"].tolist()) == {11, 12}


def test_an_average_is_of_adamws_weights_after_a_flush(best):
    averages = []
    for make in (LazyAdam, torch.optim.AdamW):
        table, optimizer = build(sparse=False, make=make, **({"missed": "replay"} if make is LazyAdam else {}))
        if make is LazyAdam:
            optimizer.attach(table)
        average = AveragedModel(table)
        schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)
        for step in range(10):
            ids, target = batch(step)
            optimizer.zero_grad()
            (table(ids) * target.float()).sum().backward()
            optimizer.step(**({"rows": {table.weight: ids}} if make is LazyAdam else {}))
            if make is LazyAdam:
                optimizer.flush()
            average.update_parameters(table)
            schedule.step()
        averages.append(average.module.weight.detach())
    torch.testing.assert_close(*averages, rtol=1e-5, atol=1e-6)


def test_copies_stand_alone(best):
    """A copied module no longer asks this optimizer; one that is loaded without its optimizer works."""
    table, optimizer = build(missed="replay")
    optimizer.attach(table)
    train(table, optimizer, range(10))
    optimizer.flush()
    twin = copy.deepcopy(table)
    assert torch.equal(twin(torch.arange(V)), table(torch.arange(V)))
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).state_dict()["weight"], table.weight)
    del optimizer
    assert torch.equal(table(torch.arange(V)), twin(torch.arange(V)))


def test_loaded_weights_owe_nothing_of_the_steps_before():
    embedding = nn.Embedding(6, 3, sparse=True)
    best = {name: x + 1 for name, x in embedding.state_dict().items()}
    optimizer = LazyAdam(embedding.parameters(), lr=0.1, weight_decay=0.1, missed="replay")
    optimizer.attach(embedding)
    for ids in ([0, 1], [2], [3]):
        optimizer.zero_grad()
        embedding(torch.tensor(ids)).square().sum().backward()
        optimizer.step()
    embedding.load_state_dict(best)
    assert torch.equal(embedding(torch.arange(6)), best["weight"])
