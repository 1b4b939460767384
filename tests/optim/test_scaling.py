"""What a step does with all gradients alike: a factor, as of clipping, and GradScaler's scale and found infinity."""

import copy
from unittest import mock

import pytest
import torch
from optim_state import bits
from torch import nn

from fastbert import LazyAdam, clip_grad_norm_
from fastbert.optim import gradients
from fastbert.optim.scaling import Scaling

SHAPES = (6, 4), (5,), ()


def parameters(kind="dense"):
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    give_gradients(params, kind)
    return params


def give_gradients(params, kind="dense"):
    for param in params:
        param.grad = torch.randn(param.shape)
    if kind == "sparse":
        ids = torch.tensor([[4, 1, 4]])
        params[0].grad = torch.sparse_coo_tensor(ids, torch.randn(3, 4), (6, 4), check_invariants=True)


def rows_of(params, kind):
    return {params[0]: torch.tensor([3, 0, 3])} if kind == "named" else None


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("kind", ["dense", "named", "sparse"])
def test_a_clipped_step_is_clipping_and_a_step(best, kind, max_norm):
    """Two steps, the second by a plan. Sums of duplicates are multiplied instead of what they are of."""
    ours = parameters(kind)
    theirs = copy.deepcopy(ours)
    optimizer, other = LazyAdam(ours, lr=0.1), LazyAdam(theirs, lr=0.1)
    for _ in range(2):
        give_gradients(ours, kind)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        before = ours[1].grad.clone()
        norm, factor = optimizer.clip_factor(max_norm, rows=rows_of(ours, kind))
        optimizer.step(rows=rows_of(ours, kind), grad_factor=factor)
        assert torch.equal(norm, clip_grad_norm_(theirs, max_norm, rows=rows_of(theirs, kind)))
        other.step(rows=rows_of(theirs, kind))
        assert torch.equal(ours[1].grad, before), "a gradient was changed"
        assert factor == 1 if max_norm > 1 else factor < 1
    for p, q in zip(ours, theirs, strict=True):
        for a, b in zip(bits(optimizer, p), bits(other, q), strict=True):
            if kind == "sparse":
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


def test_a_factor_of_float64_parameters_is_float64():
    ours = nn.Parameter(torch.ones(2, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    ours.grad, theirs.grad = torch.ones(2).double(), torch.ones(2).double() / 3
    LazyAdam([ours]).step(grad_factor=torch.tensor(1 / 3, dtype=torch.float64))
    LazyAdam([theirs]).step()
    assert torch.equal(ours, theirs)


def test_what_is_no_number_is_refused(best):
    params = parameters()
    optimizer = LazyAdam(params)
    before = [param.detach().clone() for param in params]
    for bad in (0.5, torch.ones(2)):
        with pytest.raises(TypeError, match="grad_factor must be a tensor of one number"):
            optimizer.step(grad_factor=bad)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)) and not optimizer.state


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_grad_scaler_divides_within_the_step(best, kind):
    """A power of two divides exactly; an infinite gradient leaves everything, counts included."""
    ours = parameters(kind)
    theirs = copy.deepcopy(ours)
    optimizer, other = LazyAdam(ours, lr=0.1), LazyAdam(theirs, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # which makes its scale
    for is_bad in (False, True, False):
        scale = scaler.get_scale()
        give_gradients(ours, kind)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
            p.grad = p.grad * scale
        if is_bad:
            ours[1].grad[2] = torch.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
        for p, q in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(bits(optimizer, p), bits(other, q), strict=True))
    assert optimizer.state[ours[0]]["step"] == 2 and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("kind", ["dense", "named", "sparse"])
def test_kernels_look_at_what_was_found_themselves(modules, kind):
    """As on a GPU, whose host does not look: by a plan, and by all arguments the first time."""
    params = parameters(kind)
    optimizer = LazyAdam(params, lr=0.1)
    with mock.patch.object(Scaling, "says_stop", lambda self: False):
        for found, count in ((1.0, 0), (0.0, 1), (1.0, 1), (0.0, 2)):
            before = [param.detach().clone() for param in params]
            optimizer.found_inf = torch.tensor(found)
            optimizer.step(rows=rows_of(params, kind))
            for param, was in zip(params, before, strict=True):
                assert optimizer.state[param]["step"] == count
                assert torch.equal(param, was) == (found == 1)


@pytest.mark.parametrize("modules", ["cuda:values"], indirect=True)
def test_a_bad_id_that_a_kernel_finds_counts_nothing(modules):
    """On a GPU ids are not looked at before: the step changes nothing, and the next call says why."""
    with mock.patch.object(gradients, "check_rows"):
        params = parameters("sparse")
        optimizer = LazyAdam(params, lr=0.1)
        optimizer.step()
        before = [bits(optimizer, param) for param in params]
        ids = torch.tensor([[1, 6, 2]])
        params[0].grad = torch.sparse_coo_tensor(ids, torch.randn(3, 4), (6, 4), check_invariants=False)
        optimizer.step()
        for param, was in zip(params, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(bits(optimizer, param), was, strict=True))
        give_gradients(params)
        with pytest.raises(ValueError, match="a row id outside its table, at place 1 of rows"):
            optimizer.step()
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 2


def test_a_learning_rate_is_read_where_it_lies(modules):
    params = parameters()
    rate = torch.tensor(0.0, dtype=torch.float64)
    optimizer = LazyAdam(params, lr=rate, eps=0.0)
    for value in (0.5, 0.25):
        rate.fill_(value)
        before = params[2].item()
        params[2].grad = torch.tensor(1.0)
        optimizer.step()
        assert before - params[2].item() == pytest.approx(value, rel=1e-5)  # m / sqrt(v), corrected, is 1
