"""The masked word loss of a patched model in training: logits where labels are, and nowhere else."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from fastbert.models.inputs import IGNORED
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.patching.encoder import activated, as_asked, norm, product
from fastbert.patching.kinds import WordHead
from fastbert.patching.padding import check_labels


def predict(head: Callable[[nn.Module], WordHead], model: nn.Module, original: Callable, given: dict[str, Any]) -> Any:
    """What the `forward` of a patched `...ForMaskedLM` or `...ForPreTraining` returns; `given`: arguments by name.

    In evaluation mode and without labels, all that the model has a head for, it is the original's, whose logits are
    [B, S, V]. In training words' logits are computed at labels that are not -100, and the output has none.

    Raises:
        ValueError: labels that are not one a token, or stand at padding, which would count predictions of zeros.
    """
    parts = head(model)
    labels, pair = given.get("labels"), parts.pair
    pair_labels = given.get(pair.label) if pair else None
    if labels is None or (pair and pair_labels is None) or not model.training:
        return original(model, **given)
    check_labels(labels, given.get("attention_mask"))
    own = "labels", "return_dict", *([pair.label] if pair else ())
    output = model.base_model(**{name: value for name, value in given.items() if name not in own}, return_dict=True)
    hidden = output.last_hidden_state
    if labels.numel() != hidden.shape[:2].numel():  # or they would be read as those of other tokens
        raise ValueError(
            f"labels must have one for each token, shape {list(hidden.shape[:2])}, got {list(labels.shape)}: pad them "
            f"with {IGNORED} as the words are padded"
        )
    loss = _loss(parts, hidden, labels)
    more = {"hidden_states": output.hidden_states, "attentions": output.attentions}
    if pair is None:
        result = MaskedLMOutput(loss, **more)
    else:
        scores = pair.classifier(output.pooler_output)  # [B, 2]
        pair_loss = nn.functional.cross_entropy(scores.view(-1, 2), pair_labels.view(-1).to(scores.device))
        result = pair.output(loss=loss + pair_loss, **{pair.logits: scores}, **more)
    return as_asked(model, given, result)


def _loss(head: WordHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """hidden [B, S, H] and labels [B, S] -> float32 scalar, the mean; 0 where all labels are -100."""
    labels = labels.to(hidden.device).flatten()
    places = (labels != IGNORED).nonzero().squeeze(1)
    x = hidden.flatten(0, 1).index_select(0, places)  # [M, H]
    logits = product(head.decoder, norm(head.norm, activated(head.dense, head.activation, x)))
    return cross_entropy(logits, labels.index_select(0, places), IGNORED)
