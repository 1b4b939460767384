"""What LazyAdam refuses, before anything is changed."""

import pytest
import torch
from optim_state import bits
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fastbert
from fastbert import LazyAdam, clip_grad_norm_


def two_sparse_axes(param):
    param.grad = torch.eye(3, 2).to_sparse()


def bad_sparse_ids(param):
    ids, values = torch.tensor([[0, 3]]), torch.ones(2, 2)
    param.grad = torch.sparse_coo_tensor(ids, values, (3, 2), check_invariants=False)


def sparse_with_rows(param):
    param.grad = torch.eye(3, 2).to_sparse(1)
    return torch.tensor([0])


WRONG = {
    "id beyond the table": (ValueError, r"\[0, 3\), got 3", lambda p: torch.tensor([[0], [3]])),
    "negative id": (ValueError, "got -1", lambda p: torch.tensor([-1])),
    "float ids": (TypeError, "integer tensor of row ids, got torch.float32", lambda p: torch.tensor([0.0])),
    "a mask": (TypeError, "got torch.bool", lambda p: torch.tensor([True, False, True])),
    "a list": (TypeError, "got <class 'list'>", lambda p: [0]),
    "rows of a sparse gradient": (ValueError, "is sparse and holds them itself", sparse_with_rows),
    "two sparse axes": (ValueError, "1 sparse axis", two_sparse_axes),
    "sparse id beyond the table": (ValueError, r"\[0, 3\), got 3", bad_sparse_ids),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_gradients_change_nothing(best, what):
    error, message, spoil = WRONG[what]
    first, last = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 2))
    optimizer = LazyAdam([first, last])
    first.grad, last.grad = torch.ones(4), torch.ones(3, 2)
    optimizer.step()
    before = bits(optimizer, first) + bits(optimizer, last)
    ids = spoil(last)
    rows = None if ids is None else {last: ids}
    with pytest.raises(error, match=message):
        optimizer.step(rows=rows)
    with pytest.raises(error, match=message):
        clip_grad_norm_([first, last], 1e-3, rows=rows)
    after = bits(optimizer, first) + bits(optimizer, last)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and first.grad.tolist() == [1, 1, 1, 1]


def test_a_step_that_no_backend_takes_does_not_count_and_leaves_no_state():
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = LazyAdam(params)
    optimizer.step()
    before = bits(optimizer, params[0])
    fresh = LazyAdam(params)
    for refused in (optimizer, fresh):
        with fastbert.use_backend("cpu"), pytest.raises(RuntimeError, match=r"got torch\.float64"):
            refused.step()
    assert not fresh.state
    assert all(torch.equal(a, b) for a, b in zip(before, bits(optimizer, params[0]), strict=True))


def test_bad_arguments(best):
    param, stranger = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    optimizer = LazyAdam([param])
    for call in (optimizer.step, lambda rows: clip_grad_norm_([param], 1.0, rows=rows)):
        with pytest.raises(ValueError, match="the keys must be the parameters themselves"):
            call(rows={stranger: torch.tensor([0])})
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got nan"):
        optimizer.step()
    assert param.tolist() == [[1, 1]] * 3 and not optimizer.state
    with pytest.raises(ValueError, match="max_norm must be"):
        clip_grad_norm_([param], float("nan"))
    with pytest.raises(TypeError, match="max_norm must be a number >= 0, got '1'"):
        clip_grad_norm_([param], "1")
    for options, message in (
        ({"lr": -1.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": torch.ones(2)}, "lr must be a float or a tensor of one element"),
        ({"betas": (1.0, 0.9)}, r"beta1 must lie in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, "beta2"),
        ({"betas": (0.9, float("nan"))}, "beta2"),
        ({"betas": (0.9, torch.tensor(0.999))}, "two floats or two tensors"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"lazy": True}, "lazy must be one of None, 'rows', 'nonzero', got True"),
        ({"eps_mode": "sparse"}, "eps_mode must be one of"),
        ({"bias_correction": "none"}, "bias_correction must be one of"),
        ({"missed": "skip"}, "missed must be one of"),
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype must be one of"),
        ({"padding_idx": 3}, "padding_idx must be a row"),
        ({"padding_idx": -1}, "padding_idx must be a row"),
        ({"missed": "replay", "betas": (0.9, 0.81)}, r"beta1 < sqrt\(beta2\)"),
        ({"missed": "replay", "amsgrad": True}, "does not go with amsgrad"),
        ({"missed": "replay", "bias_correction": "row"}, "does not go with bias_correction"),
        ({"missed": "replay", "lazy": "nonzero"}, "does not go with lazy"),
        ({"missed": "replay", "row_wise": True}, "does not go with row_wise"),
        ({"missed": "replay", "exp_avg_dtype": torch.bfloat16}, "does not go with exp_avg_dtype"),
        ({"missed": "replay", "weight_decay": 0.1, "decoupled_weight_decay": False}, "does not go with coupled"),
        ({"differentiable": True}, "differentiable=False"),
        ({"seed": None}, "seed must be an int of 64 bits, got None"),
        ({"seed": 2**63}, "seed must be an int of 64 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyAdam([param], **options)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [stranger], **options})
    for options, message in (
        ({"lr": "x"}, "lr must be a number, got 'x'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"betas": 0.9}, r"betas must be two numbers \(beta1, beta2\), got 0.9"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas must be two numbers"),
        ({"betas": "ab"}, "betas must be two numbers"),
        ({"betas": (0.9, None)}, "beta2 must be a number, got None"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, got '0.1'"),
        ({"weight_decay": torch.tensor(0.1)}, "weight_decay must be a float, got a tensor"),
        ({"amsgrad": "no"}, "amsgrad must be True or False, got 'no'"),
        ({"row_wise": None}, "row_wise must be True or False"),
        ({"padding_idx": 1.5}, "padding_idx must be an int or None, got 1.5"),
    ):
        with pytest.raises(TypeError, match=message):
            LazyAdam([param], **options)
        with pytest.raises(TypeError, match=message):
            optimizer.add_param_group({"params": [stranger], **options})
    with pytest.raises(TypeError, match=r"rows must be a dict of parameters and their row ids"):
        optimizer.step(rows=torch.tensor([0]))
    with pytest.raises(TypeError, match="a parameter group must be a dict"):
        optimizer.add_param_group([stranger])
    for bad in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="dense floating parameters"):
            optimizer.add_param_group({"params": [nn.Parameter(bad, requires_grad=False)]})
    with pytest.raises(TypeError, match="cannot reach that of a TwoTensor"):  # as of FSDP2's DTensor
        LazyAdam([nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("state", ["with state", "without"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number >= 0, got nan"),
        ({"betas": (1.0, 0.999)}, r"beta1 must lie in \[0, 1\), got 1.0"),
        ({"lr": -1e-3}, "lr must be a finite number >= 0, got -0.001"),
        ({"lr": torch.tensor(torch.inf)}, "lr must be a finite number >= 0"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
        ({"eps_mode": "sparse"}, "eps_mode must be one of"),
        ({"bias_correction": "rows"}, "bias_correction must be one of"),
        ({"padding_idx": 1.5}, "padding_idx must be an int or None, got 1.5"),
        ({"padding_idx": 3}, "padding_idx must be a row of every parameter"),
        ({"missed": "replay", "betas": (0.9, 0.81)}, r"beta1 < sqrt\(beta2\)"),
        ({"missed": "replay", "amsgrad": True}, "does not go with amsgrad"),
        ({"missed": "replay", "weight_decay": 0.1, "decoupled_weight_decay": False}, "does not go with coupled"),
    ],
    ids=str,
)
def test_options_changed_later_are_held_to_the_same_rules(options, message, state):
    first, last = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 2))
    optimizer = LazyAdam([{"params": [first]}, {"params": [last]}])
    first.grad, last.grad = torch.ones(4), torch.ones(3, 2)
    if state == "with state":
        optimizer.step()
    kept = dict(optimizer.param_groups[1])
    before = [x for p in (first, last) for x in (bits(optimizer, p) if optimizer.state else [p.detach().clone()])]
    optimizer.param_groups[1].update(options)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    after = [x for p in (first, last) for x in (bits(optimizer, p) if optimizer.state else [p.detach().clone()])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and len(before) == len(after)
    optimizer.param_groups[1].update(kept)
    optimizer.step()
    assert (first < before[0]).all()


def test_moments_cannot_be_kept_otherwise_halfway():
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    for option in ({"row_wise": True}, {"exp_avg_dtype": torch.bfloat16}):
        optimizer = LazyAdam([param])
        optimizer.step()
        optimizer.param_groups[0].update(option)
        with pytest.raises(ValueError, match="steps have been taken otherwise"):
            optimizer.step()
        assert optimizer.state[param]["step"] == 1


def test_elements_that_share_memory_are_refused_before_others_step():
    for shared in (torch.ones(1, 2).expand(3, 2), torch.ones(4).as_strided((3, 2), (1, 1))):
        with pytest.raises(ValueError, match="must not share memory"):
            LazyAdam([nn.Parameter(shared)])
        first, last = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 2))
        optimizer = LazyAdam([first, last])
        last.data = shared
        first.grad, last.grad = torch.ones(4), torch.ones(3, 2)
        with pytest.raises(ValueError, match="must not share memory"):
            optimizer.step()
        assert (first == 1).all() and (last == 1).all() and not optimizer.state
    for apart in (torch.ones(2, 3).T, torch.ones(3, 4)[:, ::2], torch.ones(1, 2).expand(1, 2), torch.ones(1).expand(0)):
        LazyAdam([nn.Parameter(apart)])


def test_rows_to_bring_are_held_to_the_same_rules():
    embedding = nn.Embedding(3, 2, padding_idx=0)
    optimizer = LazyAdam(embedding.parameters(), missed="replay")
    with pytest.raises(TypeError, match=r"integer tensor of row ids, got torch\.float32"):
        optimizer.catch_up(embedding.weight, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"\[0, 3\), got 3"):
        optimizer.catch_up(embedding.weight, torch.tensor([3]))
    with pytest.raises(TypeError, match=r"attach takes an nn\.Embedding"):
        optimizer.attach(nn.Linear(2, 3))
    embedding.padding_idx = 1.5
    with pytest.raises(TypeError, match="padding_idx must be an int"):
        optimizer.attach(embedding)
