"""Gradients of several backward passes added up: by hand, and as autograd adds them."""

import pytest
import torch

from fastbert.optim import accumulate
from fastbert.optim.accumulate import AddedGradients


def test_worked_out_by_hand():
    """Of 16 bits in float32; one parameter has no gradient in the first pass, one never."""
    half, whole, never = (
        torch.nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float32)
    )
    added = AddedGradients([half, whole, never])
    for gradients in (((256.0, 1.0), None), ((1.0, 2.0), (3.0, 4.0)), ((1.0, 3.0), (0.5, 0.25))):
        for param, grad in zip((half, whole), gradients, strict=True):
            if grad is not None:
                (param * torch.tensor(grad, dtype=param.dtype)).sum().backward()
        added.take()
        assert half.grad is whole.grad is None
    added.give_back()
    assert half.grad.dtype == torch.float32 and half.grad.tolist() == [258.0, 6.0]  # bfloat16 has no 257
    assert whole.grad.tolist() == [3.5, 4.25] and never.grad is None
    half.grad = whole.grad = None
    added.take()
    added.give_back()
    assert half.grad is None


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_as_autograd_adds_them(monkeypatch, chunk):
    """A sparse gradient stays autograd's."""
    monkeypatch.setattr(accumulate, "CHUNK", chunk)
    table = torch.nn.Embedding(9, 4, sparse=True)
    model = torch.nn.Sequential(table, torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    batches = torch.randint(9, (3, 5))

    def gradients(added):
        model.zero_grad()
        for batch in batches:
            model(batch).square().sum().backward()
            if added:
                added.take()
        if added:
            added.give_back()
        return [param.grad.to_dense() for param in model.parameters()]

    expected = gradients(None)
    for a, b in zip(gradients(AddedGradients(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert table.weight.grad.is_sparse
