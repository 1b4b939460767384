"""One epoch of fine-tuning after another, and what is trained: an encoder with a new head.

Word embeddings get a sparse gradient here, as nothing decodes through them, and LazyAdam moves the rows of a step's
words alone. Sequences are packed: no product is computed of padding.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastbert.data.texts import Encoded
from fastbert.finetune.predict import Classifier, autocast, computed, logits_of, packed_logits
from fastbert.finetune.settings import FinetuneConfig, TaskConfig
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, ProblemType, SequenceClassifier
from fastbert.models.config import ModelConfig
from fastbert.models.features import FeatureClassifier
from fastbert.optim.lazy_adam import LazyAdam, decay_groups
from fastbert.pretrain.schedule import learning_rate

EVALUATED = 8192  # tokens at a time
USUAL_DROPOUT, FEATURES_RATE = 0.1, 1e-2  # of a head over features
WIDTH, RATE = 768, 5e-5  # BERT base's width, and of the rates that Devlin et al. (2019) tried the largest


def make_model(config: FinetuneConfig, classes: list[str]) -> SequenceClassifier | FeatureClassifier:
    """The folder's model with a new head."""
    torch.manual_seed(config.seed)  # of the head, and of a pooler that the folder lacks
    problem_type = "regression" if config.regression else "single_label_classification"
    if config.features:
        dropout = USUAL_DROPOUT if config.dropout is None else config.dropout
        return FeatureClassifier.over(config.init, classes, problem_type, dropout, config.pair is not None)
    return over_folder(config.init, config.dropout, classes, problem_type, config.pair is not None)


def over_folder(
    folder: Path, dropout: float | None, labels: Sequence[str], problem_type: ProblemType, pairs: bool
) -> SequenceClassifier:
    """The folder's encoder with a new head, to be trained here; with None the folder's dropout."""
    kind = class_of(folder, CLASSIFIERS)
    encoder = class_of(folder, ENCODERS).from_pretrained(folder, add_pooling_layer=kind.takes_pooler)
    encoder.config = dataclasses.replace(encoder.config, **dropout_fields(dropout, encoder.config))
    model = kind.over(encoder, labels, problem_type, pairs)
    model.base_model.embeddings.word_embeddings.sparse = True
    return model


def dropout_fields(probability: float | None, sizes: ModelConfig) -> dict[str, float]:
    """What a probability of dropout changes in an encoder's configuration; None changes nothing.

    Raises:
        ValueError: attention weights are to be dropped of a model that has none.
    """
    if probability and sizes.attention_kind != "soft":
        raise ValueError(
            f"dropout must be 0 (--dropout 0), or left out for the folder's, for a model of attention_kind "
            f"{sizes.attention_kind}, which has no weights to drop, got {probability}"
        )
    names = "hidden_dropout_prob", "attention_probs_dropout_prob"
    return {} if probability is None else dict.fromkeys(names, probability)


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
    def into(self, model: Classifier) -> Classifier:
        """A copy of the model that gives the numbers themselves."""
        model = copy.deepcopy(model)
        model.classifier.weight.mul_(self.deviation)
        model.classifier.bias.mul_(self.deviation).add_(self.mean)
        return model


class Trainer:
    """Goes over the training texts, a new order every epoch; the learning rate's way is that of all epochs.

    Args:
        config: the run's settings.
        model: what is trained.
        encoded: N texts. targets: int64 [N], classes, or float32 [N], standardized numbers.

    Attributes:
        step: steps taken so far. steps: those of an epoch.
        texts: that an epoch goes over.
        total: the sum of the texts' losses in the epoch so far.
    """

    def __init__(self, config: TaskConfig, model: Classifier, encoded: list[Encoded], targets: Tensor):
        self.config, self.model, self.encoded, self.targets = config, model, encoded, targets
        self.lr = self.usual_lr() if config.lr is None else config.lr
        self.optimizer = LazyAdam(decay_groups(self.learned(), config.weight_decay), lr=self.lr, eps=1e-6)
        self.texts = len(encoded)
        self.step, self.total = 0, 0.0

    def learned(self) -> nn.Module:
        """All that the optimizer moves and a snapshot keeps."""
        return self.model

    def usual_lr(self) -> float:
        return RATE * WIDTH / self.model.config.hidden_size

    def order(self, number: int) -> Tensor:
        """Places of the texts in the order of epoch `number`, counted from 0: int64 [texts]."""
        generator = torch.Generator().manual_seed((self.config.seed << 16) + number)
        return torch.randperm(self.texts, generator=generator)

    def loss(self, places: Tensor) -> Tensor:
        """The mean loss of the texts at these places."""
        with autocast(self.config):
            logits = packed_logits(self.model, [self.encoded[i] for i in places.tolist()])
        return self.model.loss(logits, self.targets[places].to(self.config.device))

    def logits(self, held_out: list[Encoded]) -> Tensor:
        """Of the texts to evaluate on, float32 [texts, labels], on the CPU."""
        return logits_of(self.model, held_out, self.config, EVALUATED)

    @property
    def steps(self) -> int:
        return -(-self.texts // self.config.batch_size)

    def epoch(self) -> Iterator[None]:
        """Trains an epoch, or what is left of the one that was begun; gives way between its steps."""
        number, begun = divmod(self.step, self.steps)
        if not begun:
            self.total = 0.0
        order = self.order(number).split(self.config.batch_size)
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
        return self.total / self.texts

    def _take_step(self, places: Tensor) -> float:
        config = self.config
        lr = learning_rate(self.step, self.steps * config.epochs, self.lr, config.warmup)
        loss = self.loss(places)
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


class FeatureTrainer(Trainer):
    """Trains a `FeatureClassifier`'s head: the frozen model computes each text once, before the first step.

    The means of all texts' layers are kept in memory, 4 * (layers + 1) * H bytes a text.
    """

    model: FeatureClassifier

    def __init__(self, config: FinetuneConfig, model: FeatureClassifier, encoded: list[Encoded], targets: Tensor):
        super().__init__(config, model, encoded, targets)
        self.means, self._held_out = self._compute(encoded), None

    def learned(self) -> nn.Module:
        return nn.ModuleDict({"mix": self.model.mix, "classifier": self.model.classifier})

    def usual_lr(self) -> float:
        return FEATURES_RATE

    def loss(self, places: Tensor) -> Tensor:
        device = self.config.device
        logits = self.model.head(self.means[places].to(device))
        return self.model.loss(logits, self.targets[places].to(device))

    @torch.inference_mode()
    def logits(self, held_out: list[Encoded]) -> Tensor:
        if self._held_out is None:
            self._held_out = self._compute(held_out)
        self.model.eval()
        return torch.cat([self.model.head(part.to(self.config.device)) for part in self._held_out.split(4096)]).cpu()

    def _compute(self, encoded: list[Encoded]) -> Tensor:
        """float32 [texts, L + 1, H] on the CPU."""
        sizes = self.model.config
        means = torch.empty(len(encoded), 1 + sizes.num_hidden_layers, sizes.hidden_size)
        with torch.no_grad(), autocast(self.config):
            for places, packed in computed(encoded, sizes, EVALUATED, "computing features"):
                means[places] = self.model.means(**packed.arguments(self.config.device))[: len(places)].cpu()
        return means
