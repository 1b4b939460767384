"""Heads that read every row of a batch, of which those at padding are 0 in a patched model.

An answer is sought among tokens alone, and labels at padding are refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from fastbert.models.inputs import IGNORED
from fastbert.patching.encoder import as_asked

NO_ANSWER = -1e4  # a logit whose probability is 0 in every dtype; the sum of two, which scripts rank, is finite in all


def answer(model: nn.Module, original: Callable, given: dict[str, Any]) -> Any:
    """What the `forward` of a patched `...ForQuestionAnswering` returns; `given`: arguments by name.

    Logits at padding are -1e4, so the loss is that of a softmax over the tokens of each text.

    Raises:
        ValueError: an answer starts or ends at padding.
    """
    output = original(model, **given | {"return_dict": True})
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == output.start_logits.shape:
        output = _among_tokens(output, mask == 0, given.get("start_positions"), given.get("end_positions"))
    return as_asked(model, given, output)


def _among_tokens(
    output: QuestionAnsweringModelOutput, padding: Tensor, starts: Tensor | None, ends: Tensor | None
) -> QuestionAnsweringModelOutput:
    """The output again with logits and loss without padding [B, S]."""
    padding = padding.to(output.start_logits.device)
    logits = [x.masked_fill(padding, NO_ANSWER) for x in (output.start_logits, output.end_logits)]
    loss = None
    if starts is not None and ends is not None:
        # As transformers has it: places behind the batch's end are ignored.
        places = [x.to(padding.device).flatten().clamp(0, padding.shape[1]) for x in (starts, ends)]
        _check_answers(torch.stack(places), padding)
        losses = [F.cross_entropy(x, at, ignore_index=padding.shape[1]) for x, at in zip(logits, places, strict=True)]
        loss = sum(losses) / 2
    return QuestionAnsweringModelOutput(loss, *logits, hidden_states=output.hidden_states, attentions=output.attentions)


@torch.compiler.disable  # it looks at the places
def _check_answers(places: Tensor, padding: Tensor) -> None:
    """places [2, B], up to S."""
    columns = F.pad(padding, (0, 1))  # [B, S + 1]
    count = int(columns.gather(1, places.T).any(1).sum())
    if count:
        raise ValueError(
            f"{count} answers start or end at padding, where a patched model has none: mend start_positions and "
            f"end_positions, or put {padding.shape[1]} (the length of the batch) for an answer that was cut off"
        )


def classify(model: nn.Module, original: Callable, given: dict[str, Any]) -> Any:
    """What the `forward` of a patched `...ForTokenClassification` returns: the original's, of labels at tokens alone.

    Raises:
        ValueError: labels at padding, in training, which would count predictions of zeros.
    """
    if model.training and given.get("labels") is not None:
        check_labels(given["labels"], given.get("attention_mask"))
    return original(model, **given)


@torch.compiler.disable  # it looks at the labels
def check_labels(labels: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError where labels [B, S] are not -100 at padding; other shapes are not looked at."""
    if mask is None or mask.shape != labels.shape:
        return
    count = int(((labels != IGNORED) & (mask.to(labels.device) == 0)).sum())
    if count:
        raise ValueError(
            f"{count} labels stand at padding, where a patched model's hidden states are 0: set them to {IGNORED}, as "
            "the data collators of transformers do, or train without fastbert.patch"
        )
