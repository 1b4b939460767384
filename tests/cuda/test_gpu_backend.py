"""Tensors are carried to the GPU as they lie in memory, and what a step changes comes back."""

from types import SimpleNamespace

import torch
from gpu_backend import Carried


def test_views_are_carried_as_views_of_one_memory():
    qkv = torch.randn(5, 3, 2, 4)
    q, _, v = qkv.unbind(1)

    def both(x, y, size):
        assert x.stride() == q.stride() and y.data_ptr() - x.data_ptr() == v.data_ptr() - q.data_ptr()
        assert x.data_ptr() != q.data_ptr() and size == 7
        x += 1
        return x + y, None

    expected = q + 1 + v
    total, nothing = Carried(SimpleNamespace(both=both), "cpu").both(q, v, 7)
    assert torch.equal(total, expected) and nothing is None
    assert not torch.equal(q + v, total)  # an op changes nothing that it is given


def test_what_a_step_changes_comes_back():
    param, rows = torch.zeros(3, 2), torch.tensor([2])

    def lazy_adam_steps(steps):
        for param, rows in steps:
            param[rows] += 1.0

    Carried(SimpleNamespace(lazy_adam_steps=lazy_adam_steps), "cpu").lazy_adam_steps([(param, rows)])
    assert param.tolist() == [[0, 0], [0, 0], [1, 1]]
