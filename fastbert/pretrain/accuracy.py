"""How many of a training step's predictions were right, by the logits that its loss was computed from."""

import torch
from torch import Tensor

from fastbert.data.batches import Batch
from fastbert.models.inputs import IGNORED
from fastbert.models.pretraining import Predictions


def hits(out: Predictions, batch: Batch) -> Tensor:
    """How many predictions are right, and how many there are: of words and, where there are pairs, of pairs.

    Args:
        out: of the batch, or of the batch with padding behind it.

    Returns:
        int64 [1, 2] or [2, 2] on the batch's device, which is not waited for.
    """
    found = [_right(out.prediction_logits, batch.labels)]
    if out.sentence_logits is not None and batch.sentence_label is not None:
        found.append(_right(out.sentence_logits, batch.sentence_label))
    return torch.stack(found)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.detach()[: len(labels)]
    logits = logits if logits.is_cuda else logits.float()  # of 16 bits a CPU takes three times as long
    return torch.stack([logits.argmax(-1) == labels, labels != IGNORED]).sum(1)


def accuracies(found: Tensor, pairs_are: str) -> dict[str, Tensor]:
    """Of the sum of all `hits` of a step: mlm_accuracy, and that of `pairs_are` unless it is ""; scalars.

    An accuracy of no prediction at all is NaN.
    """
    right, count = found.unbind(1)
    names = ["mlm_accuracy", f"{pairs_are}_accuracy"] if pairs_are else ["mlm_accuracy"]
    return dict(zip(names, (right / count).unbind(), strict=True))
