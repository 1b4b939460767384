"""A student taught by a classifier: what `fastbert distill` runs, in the order it happens.

The run's folder is that of a fine-tuning (`fastbert.finetune.loop`), and beside it may be `labels/`, what the teacher
made of unlabelled texts, and `augmented.txt`, copies of the labelled ones with words replaced.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from fastbert import files
from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill.augment import MADE, augmented, load_augmenter, refuse_other_texts
from fastbert.distill.intermediate import IntermediateLoss
from fastbert.distill.labels import Source, digest_of, label, refuse_other
from fastbert.distill.settings import DistillConfig
from fastbert.distill.students import make_student, sizes_of
from fastbert.distill.training import Distiller
from fastbert.finetune.examples import read_examples
from fastbert.finetune.loop import checked, encode_both, train_epochs
from fastbert.finetune.predict import expect_pairs, load, logits_of
from fastbert.finetune.run import begun, fingerprint, resume_command
from fastbert.finetune.scores import class_scores, number_scores
from fastbert.finetune.training import EVALUATED, Scale
from fastbert.models.classification import SequenceClassifier
from fastbert.models.frozen import freeze
from fastbert.models.small import SmallClassifier


def distill(config: DistillConfig, resume: bool = False) -> Path | None:
    """Trains a student by a teacher's outputs and by labels, and keeps the epoch that scored best.

    The teacher, in evaluation mode, sees each text once: outputs for the table's are made at the start, those for
    unlabelled ones are kept in a store. What `config.output` gets, and when, is said by `finetune`.

    Args, Returns:
        As `finetune`.

    Raises:
        As `finetune`; besides ValueError for a teacher that fits neither the labels nor the student, and for a store
        that holds another teacher's outputs, or those for other texts.
    """
    config = checked(config, resume)
    teacher = load_teacher(config)
    train, evaluation, classes = read_examples(config, None if config.regression else teacher.labels)
    encoded, held_out = encode_both(config, train, evaluation, classes, teacher.config)
    student = make_student(config, teacher).to(config.device)
    inside = None
    if config.intermediate_epochs:
        inside = IntermediateLoss.between(student.base_model, teacher.base_model, config.layer_map)
        inside.to(config.device)
    teacher.to(config.device)
    known = fingerprint((encoded, held_out), (train.targets, evaluation.targets), classes), digest_of(teacher)
    source = Source.of(config, teacher) if config.unlabelled else None
    copies = config.output / MADE
    refuse_other_texts(config.output, train.texts.texts)
    augmenter = load_augmenter(config) if config.augment and not copies.exists() else None
    if source is not None and not config.augment:
        refuse_other(config.store_folder, source.identity())
    print(sizes_of(student, teacher))
    with begun(config, resume):
        if augmenter is not None and not augmented(config.output, augmenter, train.texts.texts):
            return _stop("texts were augmented", config)
        if config.augment:
            source = Source.of(config, teacher, [copies])
        if torch.device(config.device).type == "cpu":
            freeze(teacher, torch.bfloat16 if config.bf16 else None)
        labels = None
        if source is not None:
            labels = label(source, teacher, load_tokenizer(config.teacher), config)
            if labels is None:
                return _stop("the teacher labelled texts", config)
        if config.label_weight < 1:
            taught = logits_of(teacher, encoded, config, EVALUATED)
            _say_how_good(logits_of(teacher, held_out, config, EVALUATED), evaluation.targets, config)
        else:  # the labelled texts are learned by their labels alone
            taught = torch.zeros(len(encoded), len(teacher.labels))
        torch.manual_seed(config.seed)
        scale = Scale.of(train.targets) if config.regression else None
        targets = train.targets if scale is None else scale.standardized(train.targets)
        trainer = Distiller(config, student, encoded, targets, taught, labels, scale, inside, teacher)
        of = [*known, None if source is None else source.identity()]
        digest = hashlib.sha256(files.json_text(of).encode()).hexdigest()
        return train_epochs(
            trainer, held_out, evaluation.targets, classes, scale, digest, resume, lambda: _export_onnx(config)
        )


def _stop(during: str, config: DistillConfig) -> None:
    print(f"stopped while {during}; go on with: {resume_command(config)}")


def load_teacher(config: DistillConfig) -> SequenceClassifier:
    """The teacher, in evaluation mode and without gradients; ValueError where it is none for this run."""
    teacher = load(config.teacher)
    if isinstance(teacher, SmallClassifier):
        raise ValueError(
            f"{config.teacher} holds a {type(teacher).__name__}: a teacher is a BERT, ALBERT, RoBERTa or ERNIE"
        )
    if (teacher.problem_type == "regression") != config.regression:
        told = "numbers: pass --regression" if not config.regression else "classes: leave --regression out"
        raise ValueError(f"the teacher in {config.teacher} predicts {told}")
    expect_pairs(teacher, config.pair, config.teacher)
    return teacher.requires_grad_(False)


def _say_how_good(logits: Tensor, targets: Tensor, config: DistillConfig) -> None:
    if config.regression:
        scores = number_scores(targets.numpy(), logits[:, 0].double().numpy())
    else:
        scores = class_scores(targets.numpy(), logits.argmax(-1).numpy())
    print(f"the teacher itself: {'  '.join(f'{name} {value:.4f}' for name, value in scores.items())}", flush=True)


def _export_onnx(config: DistillConfig) -> None:
    if config.onnx:
        from fastbert.distill.onnx import export

        print(f"onnx      {export(config.output / 'model')}")
