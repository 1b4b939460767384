"""Epochs of distillation: labelled texts, all of them, and unlabelled ones, the next of however many there are."""

import numpy as np
import torch
from torch import Tensor

from fastbert.data.order import at_places
from fastbert.data.texts import Encoded
from fastbert.distill.labels import Labels
from fastbert.distill.losses import label_loss, logit_mse, mixed, soft_cross_entropy
from fastbert.distill.settings import DistillConfig
from fastbert.finetune.predict import Classifier, autocast, packed_logits
from fastbert.finetune.training import Scale, Trainer

SMALL_RATE = 1e-3


class Distiller(Trainer):
    """Trains the student; see `Trainer`.

    Args:
        encoded: N labelled texts. targets: as `Trainer`.
        taught: float32 [N, C], the teacher's outputs for them.
        labels: the teacher's outputs for unlabelled texts; None without.
        scale: of a regression: the teacher's outputs are standardized by it.
    """

    def __init__(
        self,
        config: DistillConfig,
        model: Classifier,
        encoded: list[Encoded],
        targets: Tensor,
        taught: Tensor,
        labels: Labels | None = None,
        scale: Scale | None = None,
    ):
        super().__init__(config, model, encoded, targets)
        self.taught, self.labels, self.scale = taught, labels, scale
        self.unlabelled = 0 if labels is None else round(config.mix * len(encoded))  # of an epoch
        self.texts = len(encoded) + self.unlabelled

    def usual_lr(self) -> float:
        return SMALL_RATE if self.config.is_small else super().usual_lr()

    def order(self, number: int) -> Tensor:
        """Places of labelled texts from 0, and behind the last of them those of unlabelled ones."""
        places = torch.cat([torch.arange(len(self.encoded)), len(self.encoded) + self._unlabelled_places(number)])
        return places[super().order(number)]

    def _unlabelled_places(self, number: int) -> Tensor:
        """Those of epoch `number`: one pass over all after another, each in an order of its own, cut into epochs."""
        if not self.unlabelled:
            return torch.empty(0, dtype=torch.int64)
        count, place, left, parts = len(self.labels), number * self.unlabelled, self.unlabelled, []
        while left:
            begun, first = divmod(place, count)
            last = min(first + left, count)
            parts.append(at_places(first, last, count, self.config.seed, begun))
            place, left = place + last - first, left - (last - first)
        return torch.from_numpy(np.concatenate(parts))

    def loss(self, places: Tensor) -> Tensor:
        encoded, taught, targets = self.batch(places)
        with autocast(self.config):
            logits = packed_logits(self.model, encoded)
        return self.output_loss(logits, taught, targets)

    def batch(self, places: Tensor) -> tuple[list[Encoded], Tensor, Tensor]:
        """The texts at these places, labelled ones first; the teacher's outputs [B, C]; the first ones' targets."""
        known = places < len(self.encoded)
        mine, others = places[known], places[~known] - len(self.encoded)
        encoded, taught, targets = [self.encoded[i] for i in mine.tolist()], self.taught[mine], self.targets[mine]
        if len(others):
            texts, logits = self.labels.take(others)
            encoded, taught = encoded + texts, torch.cat([taught, logits])
        return encoded, taught, targets

    def output_loss(self, logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of B texts: outputs [B, C] of the student and the teacher, targets [K] of the first K."""
        config, device = self.config, logits.device
        taught, targets = taught.to(device), targets.to(device)
        if self.scale is not None:
            taught = self.scale.standardized(taught)
        if self.scale is not None or config.loss == "mse":
            from_teacher = logit_mse(logits, taught)
        else:
            from_teacher = soft_cross_entropy(logits, taught, config.temperature)
        return mixed(from_teacher, label_loss(logits[: len(targets)], targets), config.label_weight)
