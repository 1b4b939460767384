"""The model that learns, as the settings say: one that is no transformer, the teacher with fewer layers, a folder's."""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill.intermediate import layer_map
from fastbert.distill.settings import DistillConfig, GeneralConfig
from fastbert.finetune.predict import Classifier
from fastbert.finetune.training import dropout_fields, over_folder
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.models.encoder import Encoder, PreTrainedModel
from fastbert.models.small import SMALL, SmallConfig
from fastbert.ops.attention_distillation import check_heads

_LAYER = re.compile(r"(.*\bencoder\.layer\.)(\d+)(\..*)")
_MAKES = "intermediate.dense.weight"


def make_student(config: DistillConfig, teacher: SequenceClassifier) -> Classifier:
    """The student with the teacher's classes, its new weights drawn by the seed.

    Raises:
        FileNotFoundError, ValueError: a folder that is no model's, or whose tokenizer is not the teacher's; more layers
            than the teacher has.
    """
    torch.manual_seed(config.seed)
    sizes, pairs = teacher.config, config.pair is not None
    if config.is_small:
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        small = SmallConfig(
            sizes.vocab_size, config.embedding_size, config.width, max_length=sizes.longest,
            pad_token_id=sizes.pad_token_id, **dropout,
        )  # fmt: skip
        return SMALL[f"fastbert_{config.student}"](small, teacher.labels, teacher.problem_type, pairs)
    if config.student == "bert":
        return _smaller(teacher, config)
    student = over_folder(Path(config.student), config.dropout, teacher.labels, teacher.problem_type, pairs)
    _expect_same_words(student, config, teacher)
    return student


def _smaller(teacher: SequenceClassifier, config: DistillConfig) -> SequenceClassifier:
    """The teacher with those of its layers that the layer map chooses, and narrower ones."""
    sizes = teacher.config
    inner = sizes.intermediate_size if config.intermediate_size is None else config.intermediate_size
    for name, most, got in (("layers", sizes.num_hidden_layers, config.layers),
                            ("intermediate_size", sizes.intermediate_size, inner)):  # fmt: skip
        if not 1 <= got <= most:
            raise ValueError(f"{name} must be from 1 to the teacher's, {most}, got {got}")
    changed = {"num_hidden_layers": config.layers, "intermediate_size": inner} | dropout_fields(config.dropout, sizes)
    smaller = dataclasses.replace(sizes, **changed)
    student = type(teacher)(smaller, teacher.labels, teacher.problem_type, pairs=config.pair is not None)
    chosen = layer_map(config.layer_map, config.layers, sizes.num_hidden_layers)
    student.load_state_dict(_narrowed(_of_layers(teacher.state_dict(), chosen), inner))
    student.base_model.embeddings.word_embeddings.sparse = True
    return student


def make_encoder(config: GeneralConfig, teacher: Encoder) -> Encoder:
    """The encoder that learns from a pretrained one, its new weights drawn by the seed.

    It has a pooler where its classifiers take one. A pooler is no part of what is learned, and is drawn anew unless it
    is a folder's.

    Raises:
        FileNotFoundError, ValueError: as `make_student`; a width that is no multiple of the heads; heads that neither
            divide the teacher's nor are a multiple of them.
    """
    torch.manual_seed(config.seed)
    if config.student != "bert":
        folder = Path(config.student)
        takes_pooler = class_of(folder, CLASSIFIERS).takes_pooler
        stored = class_of(folder, ENCODERS).from_pretrained(folder, add_pooling_layer=takes_pooler)
        _expect_same_words(stored, config, teacher)
        changed = dropout_fields(config.dropout, stored.config)
        student = type(stored)(dataclasses.replace(stored.config, **changed), add_pooling_layer=takes_pooler)
        student.load_state_dict(stored.state_dict())
        return student
    sizes = teacher.config
    width = sizes.hidden_size if config.width is None else config.width
    inner = config.intermediate_size or sizes.intermediate_size * width // sizes.hidden_size
    heads = sizes.num_attention_heads if config.heads is None else config.heads
    check_heads(heads, sizes.num_attention_heads)
    if width % heads:
        whose = "the teacher's" if config.heads is None else "its"
        raise ValueError(f"width must be a multiple of {whose} {heads} heads, got {width}")
    chosen = layer_map(config.layer_map, config.layers, sizes.num_hidden_layers)
    copies = (width, heads) == (sizes.hidden_size, sizes.num_attention_heads)
    if copies and inner > sizes.intermediate_size:
        raise ValueError(
            f"intermediate_size must be at most the teacher's, {sizes.intermediate_size}, where the student begins as "
            f"its layers, got {inner}"
        )
    changed = {
        "num_hidden_layers": config.layers, "intermediate_size": inner, "hidden_size": width,
        "num_attention_heads": heads,
    }  # fmt: skip
    changed |= dropout_fields(config.dropout, sizes)
    takes_pooler = class_of(config.teacher, CLASSIFIERS).takes_pooler
    student = type(teacher)(dataclasses.replace(sizes, **changed), add_pooling_layer=takes_pooler)
    if copies:
        taken = _narrowed(_of_layers(teacher.state_dict(), chosen), inner)
        student.load_state_dict(student.state_dict() | taken)
    return student


def _of_layers(state: dict[str, Tensor], chosen: list[int]) -> dict[str, Tensor]:
    """Of a model's state the layers with these numbers, from 1 on, numbered anew; all else as it is."""
    kept = {number - 1: i for i, number in enumerate(chosen)}
    taken = {}
    for name, x in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            taken[name] = x
        elif int(match[2]) in kept:
            taken[f"{match[1]}{kept[int(match[2])]}{match[3]}"] = x
    return taken


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


def _expect_same_words(
    student: PreTrainedModel, config: DistillConfig | GeneralConfig, teacher: PreTrainedModel
) -> None:
    """Raises ValueError unless the student of a folder reads what the teacher does."""
    folder = Path(config.student)
    if load_tokenizer(folder).to_str() != load_tokenizer(config.teacher).to_str():
        raise ValueError(
            f"{folder} has another tokenizer than the teacher in {config.teacher}, and both must read the same tokens: "
            "give a student that was trained with the teacher's, such as one of fastbert distill"
        )
    if student.config.vocab_size != teacher.config.vocab_size or student.config.longest < teacher.config.longest:
        raise ValueError(
            f"{folder} has {student.config.vocab_size} words and takes {student.config.longest} tokens, the teacher "
            f"{teacher.config.vocab_size} and {teacher.config.longest}: the student needs as many words, and no fewer "
            "tokens"
        )


def sizes_of(student: nn.Module, teacher: nn.Module) -> str:
    """What both are, in parameters, as a line to show."""
    mine, theirs = (sum(x.numel() for x in model.parameters()) for model in (student, teacher))
    return f"student: {type(student).__name__}, {mine:,} parameters; teacher: {theirs:,}"
