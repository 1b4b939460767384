"""What a student's outputs are held against: the teacher's, and labels. All in float32, a number for each text."""

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross entropy between the teacher's and the student's probabilities at a temperature T, times T squared.

        -T² sum over c of softmax(teacher / T)_c log softmax(logits / T)_c

    The gradient for the logits is T (p - q), with p and q the two probabilities at T, which differ by about 1 / T of
    what the logits do: without the factor it would shrink as 1 / T², and the weight beside the labels' loss would mean
    another thing at every temperature. Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural
    network" (2015), section 2.

    Args:
        logits: [N, C], the student's. teacher: [N, C]; takes no gradient.
        temperature: above 0.

    Returns:
        float32 [N].
    """
    probabilities = (teacher.detach().float() / temperature).softmax(-1)
    return -(temperature**2) * (probabilities * (logits.float() / temperature).log_softmax(-1)).sum(-1)


def logit_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared differences of a text's logits: [N, C], [N, C] -> float32 [N].

    Source: Ba and Caruana, "Do deep nets really need to be deep?" (2014); also the loss of Tang et al. (2019).
    """
    return (logits.float() - teacher.detach().float()).square().mean(-1)


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with classes, int64 [N], or the squared difference from numbers, floating point [N].

    Returns:
        float32 [N].
    """
    if targets.is_floating_point():
        return (logits[:, 0].float() - targets.float()).square()
    return F.cross_entropy(logits.float(), targets, reduction="none")


def mixed(from_teacher: Tensor, from_labels: Tensor, weight: float) -> Tensor:
    """The mean over N texts of (1 - weight) from_teacher + weight from_labels, of those without label from_teacher.

    Args:
        from_teacher: [N]. from_labels: [K], of the first K of these texts, which have labels.
    """
    both = torch.lerp(from_teacher[: len(from_labels)], from_labels, weight)
    return torch.cat([both, from_teacher[len(from_labels) :]]).mean()
