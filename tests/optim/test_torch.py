"""torch's own inputs for tests of Adam, AdamW and SparseAdam, with LazyAdam in their place."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from fastbert import LazyAdam

# What selects each optimizer's formula and defaults.
SELECTS = {
    "Adam": {"decoupled_weight_decay": False},
    "AdamW": {"weight_decay": 0.01},
    "SparseAdam": {"eps_mode": "sparse_adam"},
}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in SELECTS}
INPUTS = [
    pytest.param(name, given, id=f"{name}-{given.desc}")
    for name, info in INFOS.items()
    for given in info.optim_inputs_func(device="cpu")
]
TAKEN = {  # what torch refuses and LazyAdam takes or refuses by another type
    "lr as a Tensor is not supported for capturable=False and foreach=True": "foreach has no effect",
    "betas\\[0\\] as a Tensor is not supported for capturable=False and foreach=True": "foreach has no effect",
    "SparseAdam requires dense parameter tensors": "a TypeError here",
    "SparseAdam does not support complex parameters": "a TypeError here",
}
ERRORS = [
    pytest.param(given, id=f"{name}-{number}")
    for name, info in INFOS.items()
    for number, given in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    if given.error_regex not in TAKEN
]


def problem(seed, contiguous=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (10, 5) if contiguous else (10, 5, 2)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[:1] + shape[2:], generator=generator)
    return [
        nn.Parameter(x if contiguous else x[..., 0]) for x in (weight, bias)
    ]  # not contiguous: a stride of 2 between elements


def train(params, optimizer, steps, sparse):
    losses, x = [], torch.linspace(-1.0, 1.0, 5)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = (params[0] @ x + params[1]).square().sum()
            loss.backward()
            if sparse:  # two rows of each, one of them twice
                for param in params:
                    rows = torch.tensor([step % 10, (step + 3) % 10, step % 10])
                    indices, share = rows.unsqueeze(0), torch.tensor([0.25, 1.0, 0.75])
                    values = param.grad[rows] * share.view(-1, *[1] * (param.dim() - 1))
                    param.grad = torch.sparse_coo_tensor(indices, values, param.shape, check_invariants=True)
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses


@pytest.mark.parametrize("contiguous", [True, False], ids=["", "not contiguous"])
@pytest.mark.parametrize(("name", "given"), INPUTS)
def test_same_trajectory(best, name, given, contiguous):
    sparse = name == "SparseAdam"
    ours, theirs = problem(1, contiguous), problem(1, contiguous)
    optimizer = LazyAdam(ours, **{**SELECTS[name], **given.kwargs})
    other = INFOS[name].optim_cls(theirs, **given.kwargs)
    losses, expected = train(ours, optimizer, 20, sparse), train(theirs, other, 20, sparse)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert (losses[-1] > losses[0]) == bool(given.kwargs.get("maximize"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = torch.as_tensor(other.state[b][key], dtype=torch.float32)
            torch.testing.assert_close(optimizer.state[a][key], value)

    # its state goes on here, and ours there, where that optimizer takes what we have
    optimizer.load_state_dict(other.state_dict())
    if not sparse:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    train(ours, optimizer, 3, sparse)
    train(theirs, other, 3, sparse)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", ERRORS)
def test_same_refusals(given):
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    options = given.optimizer_error_input
    expect = pytest.warns if issubclass(given.error_type, Warning) else pytest.raises
    with expect(given.error_type):
        LazyAdam(problem(0) if options.params is None else options.params, **options.kwargs)
