"""A classifier or a regression trained over an encoder: what `fastbert finetune` runs, in the order it happens.

Word embeddings get a sparse gradient here, as nothing decodes through them, and LazyAdam moves the rows of a step's
words alone. Sequences are packed: no product is computed of padding.
"""

import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastbert import allocator, files
from fastbert.data.texts import Encoded, encode
from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune.examples import Examples, read_examples
from fastbert.finetune.predict import autocast, logits_of, packed_logits
from fastbert.finetune.scores import better, class_scores, confusion_picture, number_scores, scatter_picture
from fastbert.finetune.settings import FinetuneConfig
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.optim.lazy_adam import LazyAdam, decay_groups
from fastbert.pretrain.schedule import learning_rate

WIDTH, RATE = 768, 5e-5  # BERT base's width, and of the rates that Devlin et al. (2019) tried the largest
EVALUATED = 8192  # tokens at a time


def finetune(config: FinetuneConfig) -> Path:
    """Trains a classifier, or with `regression` a regression, and keeps the epoch that scored best.

    `config.output` gets `model/`, which `transformers` loads, as soon as an epoch is the best so far; at the end
    `scores.json`, every epoch's scores, and a picture of the best one's predictions.

    Returns:
        The folder with the model.

    Raises:
        ValueError, OSError: settings, folder or tables that do not hold, before anything is written; a training that
            diverged.
    """
    config.check()
    allocator.keep_memory()
    train, evaluation, classes = read_examples(config)
    model = make_model(config, classes)
    longest = model.config.longest if config.seq_len is None else config.seq_len
    if longest > model.config.longest:
        raise ValueError(f"seq_len must be at most what the model takes, {model.config.longest}, got {longest}")
    tokenizer, words = load_tokenizer(config.init), model.config.vocab_size
    encoded, held_out = (encode(tokenizer, each.texts, longest, words) for each in (train, evaluation))
    model.to(config.device)
    scale = Scale.of(train.targets) if config.regression else None
    cut = sum(each.cut for each in encoded) / len(encoded)
    print(
        f"{len(encoded):,} texts to train on, {len(held_out):,} to evaluate on; {cut:.1%} are cut at {longest} tokens\n"
        f"{'a number' if config.regression else f'{len(classes)} classes: ' + ', '.join(classes[:20])}"
    )

    metric = config.metric or ("pearson" if config.regression else "accuracy")
    trainer = Trainer(config, model, encoded, train.targets if scale is None else scale.standardized(train.targets))
    epochs: list[dict[str, float]] = []
    best = None  # the epoch's place, and what it predicted
    for epoch in range(config.epochs):
        loss = trainer.epoch(epoch)
        logits = logits_of(model, held_out, config, EVALUATED)
        predicted = logits.argmax(-1) if scale is None else scale.numbers(logits[:, 0])
        measure = class_scores if scale is None else number_scores
        scores = measure(evaluation.targets.numpy(), predicted.numpy())
        epochs.append({"epoch": epoch + 1, "loss": loss, **scores})
        is_best = better(scores[metric], None if best is None else epochs[best[0]][metric], metric)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in list(epochs[-1].items())[1:])
        print(f"epoch {epoch + 1} of {config.epochs}: {shown}{'  (best)' if is_best else ''}", flush=True)
        if is_best:
            best = epoch, predicted
            exported = model if scale is None else scale.into(model)
            exported.save_pretrained(config.output / "model", tokenizer=config.init)
        elif epoch - best[0] >= config.patience:
            print(f"no better for {config.patience} epochs: the model of epoch {best[0] + 1} is kept")
            break
    _write_report(config, epochs, best, metric, evaluation, classes)
    return config.output / "model"


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
    """Goes over the training texts, a new order every epoch; the learning rate's way is that of all epochs."""

    def __init__(self, config: FinetuneConfig, model: SequenceClassifier, encoded: list[Encoded], targets: Tensor):
        self.config, self.model, self.encoded, self.targets = config, model, encoded, targets
        self.lr = RATE * WIDTH / model.config.hidden_size if config.lr is None else config.lr
        self.optimizer = LazyAdam(decay_groups(model, config.weight_decay), lr=self.lr, eps=1e-6)
        self.steps = -(-len(encoded) // config.batch_size)  # of an epoch

    def epoch(self, number: int) -> float:
        """Trains epoch `number`, from 0; the mean loss over its texts."""
        config, total = self.config, 0.0
        generator = torch.Generator().manual_seed((config.seed << 16) + number)
        order = torch.randperm(len(self.encoded), generator=generator)
        self.model.train()
        batches = tqdm(order.split(config.batch_size), f"epoch {number + 1}", unit="step", leave=False)
        for step, places in enumerate(batches):
            loss = self._step(places, number * self.steps + step)
            total += loss * len(places)
            batches.set_postfix(loss=f"{loss:.3f}", refresh=False)
        return total / len(self.encoded)

    def _step(self, places: Tensor, step: int) -> float:
        config, model = self.config, self.model
        lr = learning_rate(step, self.steps * config.epochs, self.lr, config.warmup)
        with autocast(config):
            logits = packed_logits(model, [self.encoded[i] for i in places.tolist()])
        loss = model.loss(logits, self.targets[places].to(config.device))
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the training diverged at step {step + 1} of {self.steps * config.epochs}: its loss is {value}. Use a "
                f"lower --lr (now {self.lr:g}) or a smaller --clip (now {config.clip:g})"
            )
        loss.backward()
        _, factor = self.optimizer.clip_factor(config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_factor=factor)
        self.optimizer.zero_grad()
        return value


def _write_report(
    config: FinetuneConfig,
    epochs: list[dict[str, float]],
    best: tuple[int, Tensor],
    metric: str,
    evaluation: Examples,
    classes: list[str],
) -> None:
    place, predicted = best
    title = f"{metric} {epochs[place][metric]:.3f} on {len(predicted):,} held-out texts"
    truth, predicted = evaluation.targets.numpy(), predicted.numpy()
    if config.regression:
        name, picture = "predictions.png", scatter_picture(truth, predicted, title)
    else:
        name, picture = "confusion.png", confusion_picture(truth, predicted, classes, title)
    finite = [{key: value if value == value else None for key, value in each.items()} for each in epochs]
    scores = {"best_epoch": place + 1, "metric": metric, "epochs": finite, "settings": dataclasses.asdict(config)}
    files.write(config.output, {name: picture, "scores.json": (files.json_text(scores, indent=2) + "\n").encode()})
    print(f"\n{title}\nmodel     {config.output / 'model'}  (fastbert predict and transformers load it)")
    print(f"scores    {config.output / 'scores.json'}\npicture   {config.output / name}")
