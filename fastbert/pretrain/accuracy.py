"""How many of a training step's predictions were right, by the pass over the logits that computed its loss."""

from typing import Any

from torch import Tensor

HITS = "_hits"
PERPLEXITIES = "forward_perplexity", "backward_perplexity"  # of an ELMo


def named_hits(hits: list[Tensor], pairs_are: str) -> dict[str, Tensor]:
    """A step's `hits` as its record has them, so that the device divides nothing: mlm_hits, and `pairs_are` + _hits.

    Args:
        hits: of words and, unless `pairs_are` is "", of pairs: [2] each, how many are right and how many there are.
    """
    names = ["mlm", pairs_are] if pairs_are else ["mlm"]
    return {name + HITS: each for name, each in zip(names, hits, strict=True)}


def as_numbers(record: dict[str, Any]) -> dict[str, float]:
    """A step's record on the host, waiting for the device: what ends in _hits becomes an accuracy.

    An accuracy of no prediction at all is NaN.
    """
    return {
        name.removesuffix(HITS) + "_accuracy" if name.endswith(HITS) else name: _number(value)
        for name, value in record.items()
    }


def _number(value: Tensor | float) -> float:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return float(value)
    right, count = value.tolist()
    return right / count if count else float("nan")
