"""The model that learns, as the settings say: one that is no transformer, the teacher with fewer layers, a folder's."""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill.settings import DistillConfig
from fastbert.finetune.predict import Classifier
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.models.small import SMALL, SmallConfig

_LAYER = re.compile(r"(.*\bencoder\.layer\.)(\d+)(\..*)")

_MAKES = "intermediate.dense.weight"


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
        student = _smaller(teacher, config, changed)
    else:
        student = _of_folder(Path(config.student), config.teacher, teacher, changed)
    student.base_model.embeddings.word_embeddings.sparse = True
    return student


def _smaller(teacher: SequenceClassifier, config: DistillConfig, changed: dict[str, float]) -> SequenceClassifier:
    """The teacher with `layers` of its layers, the last and those at even distances before it, and narrower ones."""
    sizes = teacher.config
    inner = sizes.intermediate_size if config.intermediate_size is None else config.intermediate_size
    for name, most, got in (("layers", sizes.num_hidden_layers, config.layers),
                            ("intermediate_size", sizes.intermediate_size, inner)):  # fmt: skip
        if not 1 <= got <= most:
            raise ValueError(f"{name} must be from 1 to the teacher's, {most}, got {got}")
    smaller = dataclasses.replace(sizes, num_hidden_layers=config.layers, intermediate_size=inner, **changed)
    student = type(teacher)(smaller, teacher.labels, teacher.problem_type)
    kept = {(i + 1) * sizes.num_hidden_layers // config.layers - 1: i for i in range(config.layers)}
    state = {}
    for name, x in teacher.state_dict().items():
        match = _LAYER.fullmatch(name)
        if match is None:
            state[name] = x
        elif int(match[2]) in kept:
            state[f"{match[1]}{kept[int(match[2])]}{match[3]}"] = x
    student.load_state_dict(_narrowed(state, inner))
    return student


def _narrowed(state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """Each feed-forward network with the `inner` of its numbers that have the largest weights, in their order.

    How large is the product of the norms of the weights that make a number and of those that read it: without the
    activation between them, what leaving it out would change.
    """
    state = dict(state)
    for makes in [name for name in state if name.endswith(_MAKES)]:
        layer = makes.removesuffix(_MAKES)
        bias, reads = f"{layer}intermediate.dense.bias", f"{layer}output.dense.weight"
        size = state[makes].norm(dim=1) * state[reads].norm(dim=0)
        kept = size.topk(inner).indices.sort().values
        for name, axis in ((makes, 0), (bias, 0), (reads, 1)):
            state[name] = state[name].index_select(axis, kept)
    return state


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
