"""The losses on outputs against float64 worked out by hand."""

import math

import pytest
import torch

pytest.importorskip("sklearn")

from fastbert.distill.losses import label_loss, logit_mse, mixed, soft_cross_entropy


def test_soft_cross_entropy_is_its_definition_and_its_gradient_keeps_its_size():
    student, teacher = [[1.0, -2.0, 0.5], [-300.0, 0.0, -1.0]], [[2.0, 0.0, -1.0], [-400.0, 3.0, 1.0]]
    logits = torch.tensor(student, requires_grad=True)
    for temperature in (1.0, 2.0, 5.0):
        given = soft_cross_entropy(logits, torch.tensor(teacher), temperature)
        for row in range(2):
            p, q = (
                [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in each[row]) for x in each[row]]
                for each in (teacher, student)
            )
            expected = -(temperature**2) * sum(a * math.log(b) for a, b in zip(p, q, strict=True) if a)
            assert given[row].item() == pytest.approx(expected, rel=1e-6)
            (gradient,) = torch.autograd.grad(given[row], logits, retain_graph=True)
            expected = [temperature * (b - a) for a, b in zip(p, q, strict=True)]
            assert gradient[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_logit_mse_and_labels_losses_are_those_worked_by_hand():
    logits, teacher = torch.tensor([[1.0, -3.0], [0.0, 2.0]]), torch.tensor([[0.0, -1.0], [0.5, -2.0]])
    assert logit_mse(logits, teacher).tolist() == [(1 + 4) / 2, (0.25 + 16) / 2]
    expected = [math.log(1 + math.exp(-4)), math.log(1 + math.exp(2))]
    assert label_loss(logits, torch.tensor([0, 0])).tolist() == pytest.approx(expected, rel=1e-5)
    assert label_loss(logits[:, :1], torch.tensor([0.5, -2.0])).tolist() == [0.25, 4.0]


def test_a_text_without_label_learns_from_the_teacher_alone():
    teacher = torch.tensor([1.0, 2.0, 6.0])
    assert mixed(teacher, torch.tensor([5.0, 10.0]), 0.25).item() == (2.0 + 4.0 + 6.0) / 3
    assert mixed(teacher, torch.empty(0), 0.25).item() == 3.0
    assert mixed(teacher, torch.full((3,), 7.0), 1.0).item() == 7.0
