"""Which state dicts LazyAdam loads, and that it and torch.distributed.checkpoint leave each other's training alone."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_state import bits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastbert import LazyAdam

OTHERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


def stepped(make=LazyAdam, steps=1, **options):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = make([param], **options)
    for _ in range(steps):
        param.grad = torch.ones(4, 3)
        optimizer.step()
    return param, optimizer


def check_refused(state_dict, message, error=ValueError, **options):
    param, optimizer = stepped(**options)
    before, groups = bits(optimizer, param), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(optimizer, param), strict=True))
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("other", OTHERS)
def test_state_of_other_optimizers_is_refused(other, steps):
    check_refused(stepped(OTHERS[other], steps)[1].state_dict(), "of another optimizer")


def test_what_is_not_whole_is_refused():
    def spoilt(**changes):
        saved = copy.deepcopy(stepped(amsgrad=True)[1].state_dict())
        for name, value in changes.items():
            saved["state"][0][name] = value
            if value is ...:
                del saved["state"][0][name]
        return saved

    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        check_refused(spoilt(**{name: ...}), rf"lacks \['{name}'\]")
    check_refused(spoilt(mu_product=torch.ones(())), r"\['mu_product'\] is of another optimizer")
    check_refused(spoilt(step=torch.tensor(torch.nan)), "step must be a finite number >= 0, and was saved as nan")
    check_refused(spoilt(step=torch.ones(2)), "step must be one number")
    check_refused(spoilt(exp_avg=None), r"exp_avg .* must have shape \[4, 3\], and was saved with None")
    check_refused(spoilt(exp_avg=torch.ones(4, 3).int()), "must be a floating tensor")
    check_refused(nn.Linear(2, 3).state_dict(), "is it a model's")
    check_refused([1], "takes the dict that state_dict", TypeError)
    saved = spoilt()
    saved["state"][7] = saved["state"][0]
    check_refused(saved, "no group names them")
    saved = spoilt()
    saved["param_groups"][0]["betas"] = (1.0, 0.999)
    check_refused(saved, "beta1 must lie in")


def test_a_broken_record_of_missed_steps_is_refused():
    param, optimizer = stepped(missed="replay")
    param.grad = torch.ones(4, 3).index_fill_(0, torch.tensor([1, 2, 3]), 0.0)
    optimizer.step(rows={param: torch.tensor([0])})
    for changes, message in (
        ({"history": ...}, r"lacks \['history'\]"),
        ({"history": torch.ones(3)}, "history must be a tensor"),
        ({"recorded": 3}, "recorded must be an int from 0 to 2"),
        ({"recorded_with": torch.full((4,), torch.nan)}, "recorded_with must be finite"),
        (
            {"last_step": torch.tensor([0, 1, 2, 3]).int()},
            "last_step counts steps of rows, from 0 to the parameter's 2",
        ),
        ({"last_step": torch.tensor([0, 1, 2, -1]).int()}, "was saved with -1 to 2"),
        ({"exp_avg_sq": -torch.ones(4, 3)}, "exp_avg_sq is a mean of squares, never negative"),
        ({"recorded_with": ()}, "recorded_with a tensor"),
        ({"last_step": torch.ones(3).int()}, r"must have shape \[4\], and was saved with \[3\]"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        for name, value in changes.items():
            saved["state"][0][name] = value
            if value is ...:
                del saved["state"][0][name]
        check_refused(saved, message, missed="replay")


# ---- torch.distributed.checkpoint ------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"lazy": "rows"},
    {"lazy": "nonzero", "maximize": True},
    {"amsgrad": True, "eps_mode": "sparse_adam"},
    {"bias_correction": "row", "capturable": True},
    {"missed": "replay"},
    {"missed": "replay", "lazy": "rows", "lr": 0.05},
    {"decoupled_weight_decay": False},
    {"exp_avg_dtype": torch.bfloat16, "row_wise": True, "amsgrad": True},
    {"stochastic_rounding": True, "seed": 3, "dtype": torch.bfloat16},
    {"lr": torch.tensor(0.05), "padding_idx": 2},
]


def build(dtype=torch.float32, **options):
    """A table under these options beside a layer under others, one of its parameters frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).to(dtype)
    model[1].bias.requires_grad_(False)
    table = {"params": [model[0].weight], **options}
    optimizer = LazyAdam([table, {"params": model[1].parameters(), "lr": 0.1}], lr=0.02, weight_decay=0.1)
    optimizer.attach(model[0])
    return model, optimizer


def train(model, optimizer, steps):
    group = optimizer.param_groups[0]
    by_row = group["decoupled_weight_decay"] and group["lazy"] != "nonzero"
    for step in steps:
        ids = torch.randint(0, 9, (3,), generator=torch.Generator().manual_seed(step))
        model(ids).square().sum().backward()
        optimizer.step(rows={model[0].weight: ids} if by_row else None)
        optimizer.zero_grad()


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the intent, as no_dist says
@pytest.mark.parametrize("how", [{}, {"flatten_optimizer_state_dict": True}, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumed_from_a_distributed_checkpoint_is_bitwise_unbroken(options, how, tmp_path):
    how = StateDictOptions(**how)
    whole, unbroken = build(**options)
    train(whole, unbroken, range(8))

    model, optimizer = build(**options)
    rates, moved = [group["lr"] for group in optimizer.param_groups], copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer, options=how)  # before the first step, as frameworks do
    assert [group["lr"] for group in optimizer.param_groups] == rates and same(model, moved)
    assert all(state["step"] == 0 for state in optimizer.state.values()) and len(optimizer.state) == 2
    train(model, optimizer, range(5))
    with optimizer.raw():
        saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=how)}
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    model, optimizer = build(**options)
    with optimizer.raw():
        saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=how)}
        dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)
    train(model, optimizer, range(5, 8))
    assert same(model, whole)
    for param, other in zip(model.parameters(), whole.parameters(), strict=True):
        mine, theirs = optimizer.state.get(param, {}), unbroken.state.get(other, {})
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])) for name in mine)


def test_a_first_step_that_moves_something_counts(best):
    """A warm-up from a rate of 0, or a parameter whose gradient is zero beside one whose is not, is AdamW's step 1."""
    for rates, factors in (((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.1), (0.0, 0.0)), ((torch.tensor(0.0), 0.0), (0.0, 1.0))):
        trained = []
        for make in (LazyAdam, torch.optim.AdamW):
            params = [nn.Parameter(torch.ones(3)) for _ in rates]
            groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
            optimizer = make(groups, weight_decay=0.0)
            for factor in (factors, (1.0, 2.0)):
                for param, size in zip(params, factor, strict=True):
                    param.grad = torch.full((3,), size)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] = 0.1
            assert all(optimizer.state[param]["step"] == 2 for param in params)
            trained.append(params)
        for ours, theirs in zip(*trained, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_loading_cuts_no_ties():
    """State is put where a captured graph finds it, and a bfloat16 copy goes on being written."""
    param = nn.Parameter(torch.ones(3, 2))
    ours, theirs = (LazyAdam([param], lr=0.1) for _ in range(2))
    copied = ours.keep_copy(param)
    for optimizer in (ours, theirs):
        param.grad = torch.randn(3, 2)
        optimizer.step()
    before, expected = dict(ours.state[param]), theirs.state_dict()["state"][0]
    ours._is_captured = True  # tests/cuda/rehearsed.py has that a step finds out
    ours.load_state_dict(theirs.state_dict())
    for name, x in ours.state[param].items():
        assert x is before[name] and torch.equal(x, expected[name])
    ours.step()
    assert torch.equal(copied, param.bfloat16())
