"""What a transformer learns of a teacher's inside: embeddings, hidden states and attention scores, by a layer map.

All losses are means over real tokens, in float32. Source: Jiao et al., "TinyBERT: distilling BERT for natural language
understanding" (2020), section 3.1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert.models.encoder import Encoder, Layer
from fastbert.models.layers import MultiHeadAttention
from fastbert.ops.attention_distillation import attention_distillation, check_heads

MAPS = "uniform", "last"


def layer_map(kind: str | Sequence[int], layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer, counted from 1, that each of the student's learns from.

    Args:
        kind: "uniform", at even distances, the last by the last; "last", the teacher's last ones; or the numbers, which
            may be written as a string, such as "4,8,12".
        layers, teacher_layers: how many the student and the teacher have.

    Raises:
        ValueError: more layers than the teacher has, numbers out of range or not increasing, or of another count.
    """
    if kind not in MAPS:
        written = kind.split(",") if isinstance(kind, str) else kind
        chosen = [int(i) if isinstance(i, str) and i.strip().isdecimal() else i for i in written]
        rising = all(type(i) is int for i in chosen) and all(a < b for a, b in zip([0, *chosen], chosen, strict=False))
        if not (chosen and rising) or len(chosen) != layers or chosen[-1] > teacher_layers:
            raise ValueError(
                f"a layer map is {' or '.join(MAPS)}, or for each of the student's {layers} layers a number of the "
                f"teacher's, increasing, from 1 to {teacher_layers}, got {kind!r}"
            )
        return chosen
    if not 1 <= layers <= teacher_layers:
        raise ValueError(
            f"a student learns from as many layers as it has: it must have 1 to the teacher's {teacher_layers}, got "
            f"{layers}"
        )
    if kind == "last":
        return list(range(teacher_layers - layers + 1, teacher_layers + 1))
    return [(i + 1) * teacher_layers // layers for i in range(layers)]


def mean_squared(x: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of squared differences over real tokens and all numbers of each.

    Args:
        x, teacher: [..., H]; the teacher's takes no gradient.
        mask: [...], true or 1 at real tokens; None for packed tokens, which are all real.
    """
    if x.shape != teacher.shape:
        raise ValueError(f"the student's states must have the teacher's shape {list(teacher.shape)}, got "
                         f"{list(x.shape)}: a learned matrix maps another width")  # fmt: skip
    kind = torch.promote_types(x.dtype, torch.float32)
    squares = (x.to(kind) - teacher.detach().to(kind)).square().mean(-1)
    if mask is None:
        return squares.sum() / max(squares.numel(), 1)
    real = mask.bool()
    return squares.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


@dataclass
class Inside:
    """Of one pass: embeddings [T, H], and for each layer its states [T, H] and its projection [T, 3 H]."""

    embeddings: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    qkv: list[Tensor] = field(default_factory=list)


def refuse_inside(model: Encoder, who: str) -> None:
    """Raises ValueError where this encoder's layers cannot be told apart, or their attention's scores not compared."""
    layers = list(model.layers())
    if not all(isinstance(layer, Layer) for layer in layers) or len({id(layer) for layer in layers}) != len(layers):
        raise ValueError(
            f"the {who} is a {type(model).__name__}, whose layers share their weights: layers of BERT, RoBERTa "
            "or ERNIE can be taught one by one"
        )
    if not all(isinstance(layer.attention["self"], MultiHeadAttention) for layer in layers):
        raise ValueError(
            f"the {who} is a {type(model).__name__}, whose scores are of relative positions too: layers of BERT, "
            "RoBERTa or ERNIE can be taught one by one"
        )


@contextmanager
def watched(encoder: Encoder) -> Iterator[Inside]:
    """What passes through the encoder within the block. Its last layer must compute all places."""
    inside = Inside()
    hooks = [encoder.embeddings.register_forward_hook(lambda _, __, out: setattr(inside, "embeddings", out))]
    for layer in encoder.layers():
        hooks.append(layer.register_forward_hook(lambda _, __, out: inside.states.append(out[0])))
        heads = layer.attention["self"]
        hooks.append(heads.qkv.register_forward_hook(lambda _, __, out: inside.qkv.append(out)))
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


class IntermediateLoss(nn.Module):
    """The sum of the losses on embeddings, and on states and attention scores of every layer.

    Args:
        width, heads: the student's. teacher_width, teacher_heads: the teacher's. Where the numbers of heads are not the
            same, one is a multiple of the other, and the means of neighbouring heads' scores are compared.
        layers: for each of the student's layers the teacher's, counted from 1, as of `layer_map`.

    Attributes:
        project: the matrix that maps states and embeddings to the teacher's width, learned beside the student and no
            part of it; None where the widths are equal.
    """

    def __init__(self, width: int, heads: int, teacher_width: int, teacher_heads: int, layers: Sequence[int]):
        super().__init__()
        check_heads(heads, teacher_heads)
        self.heads, self.teacher_heads, self.layers = heads, teacher_heads, list(layers)
        self.project = None if width == teacher_width else nn.Linear(width, teacher_width, bias=False)

    @classmethod
    def between(cls, student: Encoder, teacher: Encoder, kind: str | Sequence[int]) -> Self:
        """Of these two encoders; a matrix between widths is drawn from torch's generator.

        Args:
            kind: as of `layer_map`.

        Raises:
            ValueError: layers, heads or a layer map that do not fit.
        """
        refuse_inside(teacher, "teacher")
        refuse_inside(student, "student")
        mine, theirs = student.config, teacher.config
        layers = layer_map(kind, mine.num_hidden_layers, theirs.num_hidden_layers)
        return cls(mine.hidden_size, mine.num_attention_heads, theirs.hidden_size, theirs.num_attention_heads, layers)

    def of_batch(self, student: Encoder, teacher: Encoder, batch: dict[str, Tensor | int]) -> Tensor:
        """The loss of a packed batch, both encoders' arguments by name; the teacher runs once, without gradients."""
        with watched(teacher) as theirs, torch.no_grad():
            teacher(**batch)
        with watched(student) as mine:
            student(**batch)
        return self(mine, theirs, batch["cu_seqlens"], batch["max_seqlen"])

    def forward(self, student: Inside, teacher: Inside, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        loss = self._states(student.embeddings, teacher.embeddings)
        for number, chosen in enumerate(self.layers):
            loss = loss + self._states(student.states[number], teacher.states[chosen - 1])
            mine, theirs = (
                q_and_k(student.qkv[number], self.heads),
                q_and_k(teacher.qkv[chosen - 1], self.teacher_heads),
            )
            loss = loss + attention_distillation(*mine, *theirs, cu_seqlens, max_seqlen)
        return loss

    def _states(self, x: Tensor, teacher: Tensor) -> Tensor:
        return mean_squared(x if self.project is None else F.linear(x, self.project.weight), teacher)


def q_and_k(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of a projection [T, 3 H] the queries and the keys, [T, heads, head size]."""
    return qkv.view(len(qkv), 3, heads, -1).unbind(1)[:2]
