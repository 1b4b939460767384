"""One epoch of fine-tuning after another, and what is trained: an encoder with a new head.

Word embeddings get a sparse gradient here, as nothing decodes through them, and LazyAdam moves the rows of a step's
words alone. Sequences are packed: no product is computed of padding.
"""

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fastbert.data.texts import Encoded
from fastbert.finetune.predict import autocast, packed_logits
from fastbert.finetune.settings import FinetuneConfig
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.optim.lazy_adam import LazyAdam, decay_groups
from fastbert.pretrain.schedule import learning_rate

WIDTH, RATE = 768, 5e-5  # BERT base's width, and of the rates that Devlin et al. (2019) tried the largest


def make_model(config: FinetuneConfig, classes: list[str]) -> SequenceClassifier:
    """The folder's encoder with a new head."""
    torch.manual_seed(config.seed)  # of the head, and of a pooler that the folder lacks
    kind = class_of(config.init, CLASSIFIERS)
    encoder = class_of(config.init, ENCODERS).from_pretrained(config.init, add_pooling_layer=kind.takes_pooler)
    if config.dropout is not None:
        encoder.config = dataclasses.replace(
            encoder.config, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout
        )
    model = kind.over(encoder, classes, "regression" if config.regression else "single_label_classification")
    model.base_model.embeddings.word_embeddings.sparse = True
    return model


@dataclasses.dataclass(frozen=True)
class Scale:
    """A regression is trained on numbers of mean 0 and deviation 1; the exported head gives them in their own units."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, targets: Tensor) -> "Scale":
        return cls(targets.mean().item(), targets.std(correction=0).item())

    def standardized(self, targets: Tensor) -> Tensor:
        return ((targets - self.mean) / self.deviation).float()

    def numbers(self, outputs: Tensor) -> Tensor:
        return outputs.double() * self.deviation + self.mean

    @torch.no_grad()
    def into(self, model: SequenceClassifier) -> SequenceClassifier:
        """A copy of the model that gives the numbers themselves."""
        model = copy.deepcopy(model)
        model.classifier.weight.mul_(self.deviation)
        model.classifier.bias.mul_(self.deviation).add_(self.mean)
        return model


class Trainer:
    """Goes over the training texts, a new order every epoch; the learning rate's way is that of all epochs.

    Attributes:
        step: steps taken so far. steps: those of an epoch.
        total: the sum of the texts' losses in the epoch so far.
    """

    def __init__(self, config: FinetuneConfig, model: SequenceClassifier, encoded: list[Encoded], targets: Tensor):
        self.config, self.model, self.encoded, self.targets = config, model, encoded, targets
        self.lr = RATE * WIDTH / model.config.hidden_size if config.lr is None else config.lr
        self.optimizer = LazyAdam(decay_groups(model, config.weight_decay), lr=self.lr, eps=1e-6)
        self.steps = -(-len(encoded) // config.batch_size)
        self.step, self.total = 0, 0.0

    def epoch(self) -> Iterator[None]:
        """Trains an epoch, or what is left of the one that was begun; gives way between its steps."""
        number, begun = divmod(self.step, self.steps)
        if not begun:
            self.total = 0.0
        generator = torch.Generator().manual_seed((self.config.seed << 16) + number)
        order = torch.randperm(len(self.encoded), generator=generator).split(self.config.batch_size)
        self.model.train()
        title = f"epoch {number + 1} of {self.config.epochs}"
        with tqdm(total=self.steps, initial=begun, desc=title, unit="step", leave=False, dynamic_ncols=True) as bar:
            for places in order[begun:]:
                loss = self._take_step(places)
                self.step, self.total = self.step + 1, self.total + loss * len(places)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if self.step % self.steps:
                    yield

    @property
    def mean_loss(self) -> float:
        """Of the texts of the epoch that was trained last."""
        return self.total / len(self.encoded)

    def _take_step(self, places: Tensor) -> float:
        config, model = self.config, self.model
        lr = learning_rate(self.step, self.steps * config.epochs, self.lr, config.warmup)
        with autocast(config):
            logits = packed_logits(model, [self.encoded[i] for i in places.tolist()])
        loss = model.loss(logits, self.targets[places].to(config.device))
        self.expect_finite(loss, f"the loss of step {self.step + 1} is")
        loss.backward()
        norm, factor = self.optimizer.clip_factor(config.clip)
        self.expect_finite(norm, f"the gradient's norm in step {self.step + 1} is")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_factor=factor)
        self.optimizer.zero_grad()
        return loss.item()

    def expect_finite(self, numbers: Tensor, what: str) -> None:
        """Raises ValueError, which says what to lower, unless all are finite."""
        if not numbers.isfinite().all():
            raise ValueError(
                f"the training diverged: {what} not finite. Start again with a lower --lr (now {self.lr:g}) or a "
                f"smaller --clip (now {self.config.clip:g}), in another --output"
            )
