"""The model that learns, as the settings say: one that is no transformer, the teacher with fewer layers, a folder's."""

import dataclasses
import re
from pathlib import Path

import torch

from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill.settings import DistillConfig
from fastbert.finetune.predict import Classifier
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.models.small import SMALL, SmallConfig

_LAYER = re.compile(r"(.*\bencoder\.layer\.)(\d+)(\..*)")


def make_student(config: DistillConfig, teacher: SequenceClassifier) -> Classifier:
    """The student with the teacher's classes, its new weights drawn by the seed.

    Raises:
        FileNotFoundError, ValueError: a folder that is no model's, or whose tokenizer is not the teacher's; more layers
            than the teacher has.
    """
    torch.manual_seed(config.seed)
    sizes = teacher.config
    if config.is_small:
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        small = SmallConfig(
            sizes.vocab_size, config.embedding_size, config.width, max_length=sizes.longest,
            pad_token_id=sizes.pad_token_id, **dropout,
        )  # fmt: skip
        return SMALL[f"fastbert_{config.student}"](small, teacher.labels, teacher.problem_type)
    changed = {}
    if config.dropout is not None:
        changed = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    if config.student == "bert":
        student = _shallower(teacher, config.layers, changed)
    else:
        student = _of_folder(Path(config.student), config.teacher, teacher, changed)
    student.base_model.embeddings.word_embeddings.sparse = True
    return student


def _shallower(teacher: SequenceClassifier, layers: int, changed: dict[str, float]) -> SequenceClassifier:
    """The teacher with `layers` of its layers: the last, and those at even distances before it."""
    depth = teacher.config.num_hidden_layers
    if layers > depth:
        raise ValueError(f"layers must be at most the teacher's, {depth}, got {layers}")
    sizes = dataclasses.replace(teacher.config, num_hidden_layers=layers, **changed)
    student = type(teacher)(sizes, teacher.labels, teacher.problem_type)
    kept = {(i + 1) * depth // layers - 1: i for i in range(layers)}
    state = {}
    for name, x in teacher.state_dict().items():
        if match := _LAYER.fullmatch(name):
            if int(match[2]) not in kept:
                continue
            name = f"{match[1]}{kept[int(match[2])]}{match[3]}"
        state[name] = x
    student.load_state_dict(state)
    return student


def _of_folder(
    folder: Path, teacher_folder: Path, teacher: SequenceClassifier, changed: dict[str, float]
) -> SequenceClassifier:
    """The folder's encoder with a new head."""
    kind = class_of(folder, CLASSIFIERS)
    if load_tokenizer(folder).to_str() != load_tokenizer(teacher_folder).to_str():
        raise ValueError(
            f"{folder} has another tokenizer than the teacher in {teacher_folder}, and both must read the same tokens: "
            "give a student that was trained with the teacher's, such as one of fastbert distill"
        )
    encoder = class_of(folder, ENCODERS).from_pretrained(folder, add_pooling_layer=kind.takes_pooler)
    if encoder.config.vocab_size != teacher.config.vocab_size or encoder.config.longest < teacher.config.longest:
        raise ValueError(
            f"{folder} has {encoder.config.vocab_size} words and takes {encoder.config.longest} tokens, the teacher "
            f"{teacher.config.vocab_size} and {teacher.config.longest}: the student needs as many words, and no fewer "
            "tokens"
        )
    encoder.config = dataclasses.replace(encoder.config, **changed)
    return kind.over(encoder, teacher.labels, teacher.problem_type)
