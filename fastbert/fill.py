"""The likeliest words for the [MASK]s of a text: what `fastbert fill` runs."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from tokenizers import Tokenizer

from fastbert.data.texts import Encoded, batches_by_length, pack
from fastbert.data.tokenizer import load_tokenizer, special_ids
from fastbert.data.words import cut_at_spaces
from fastbert.models import checkpoint, parameter_names
from fastbert.models.auto import PRETRAINING, class_of
from fastbert.models.pretraining import PreTrainingModel
from fastbert.pretrain.settings import check_device, expect

MASK = "[MASK]"  # how it may always be written
BEAM = 16  # beginnings of a word that are gone on from
BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class FillConfig:
    """Settings of `fastbert fill`; its --help shows them."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, of this program or of transformers, with its masked word head."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Texts with [MASK] where a token is wanted; several in a row are filled together, as one word or phrase."""
    top_k: int = 5
    """How many words to show for each place."""
    at_once: bool = False
    """Fill several [MASK] in a row independently, not each given those before it: for whole-word masked models."""
    json: bool = False
    """Print a JSON object a text, with ids and unrounded probabilities."""
    device: str = "cpu"
    """Where to compute, as torch names it."""

    def check(self) -> None:
        """Raises ValueError where a setting does not hold."""
        expect(type(self.top_k) is int and 1 <= self.top_k <= 1000, "top_k", "an integer from 1 to 1000", self.top_k)
        if not self.texts:
            raise ValueError(f'a text is missing: give one with {MASK} in it, such as "The film was {MASK}."')
        check_device(self.device)


class Filled(NamedTuple):
    """One filling of a gap: its text, its probability, and its ids."""

    word: str
    probability: float
    ids: tuple[int, ...]


def fill(config: FillConfig) -> None:
    """Prints the likeliest words of every gap of every text.

    Raises:
        FileNotFoundError, ValueError, OSError: settings, folder or texts that do not hold.
    """
    config.check()
    model, tokenizer = load_masked_lm(config.folder, config.device), load_tokenizer(config.folder)
    filled = fill_masks(model, tokenizer, config.texts, config.top_k, config.at_once)
    for text, gaps in zip(config.texts, filled, strict=True):
        if config.json:
            rows = [[word._asdict() for word in words] for words in gaps]
            print(json.dumps({"text": text, "gaps": rows}, ensure_ascii=False))
            continue
        print(text)
        for number, words in enumerate(gaps, 1):
            if len(gaps) > 1:
                print(f"  gap {number}")
            for word in words:
                print(f"  {word.probability:7.2%}  {word.word}")
    sys.stdout.flush()


def load_masked_lm(folder: Path, device: str = "cpu") -> PreTrainingModel:
    """The model of a folder with its masked word head, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as `AutoModel.from_pretrained`; a folder without that head, or of a model that
            predicts the next token, or by queries (XLNet).
    """
    kind = class_of(folder, PRETRAINING)
    tensors = parameter_names.normalize(checkpoint.load(folder, kind.names)[1], folder, kind.names)
    if not any(name.startswith(kind.names.predictions) for name in tensors):
        raise ValueError(
            f"{folder} holds an encoder without its masked word head ({kind.names.predictions}*), which alone knows "
            "words: give the folder of the model as it was pretrained"
        )
    with warnings.catch_warnings():
        # Other heads may be missing or more than are needed; this one is there.
        warnings.filterwarnings("ignore", message=".* (lacks .* newly initialised|has .* has no use for)")
        model = kind.from_pretrained(folder)
    if not model.fills_gaps:
        raise ValueError(
            f"{folder} holds {kind.names.article}, which predicts words by queries beside the text and has seen no "
            f"[MASK] in it: fastbert.{kind.__name__} takes perm_mask and target_mapping for that"
        )
    if model.config.is_decoder:
        raise ValueError(f"{folder} holds a model that predicts the next token and fills no gaps (is_decoder)")
    return model.to(device)


class _Gap(NamedTuple):
    """Neighbouring [MASK]s of a text: the text's ids with special tokens, and their places in it."""

    ids: list[int]
    places: list[int]


@torch.inference_mode()
def fill_masks(
    model: PreTrainingModel, tokenizer: Tokenizer, texts: Sequence[str], top_k: int = 5, at_once: bool = False
) -> list[list[list[Filled]]]:
    """The likeliest fillings of each text's gaps, a gap being a [MASK] or several in a row.

    Of several the first is filled as all are hidden, the second given the first, and so on: a filling's probability is
    the product, and the most likely `BEAM` beginnings (or 4 * top_k, where that is more) are gone on from. Other gaps
    of the text stay hidden all the while. Special tokens are no fillings, and probabilities are those among all tokens.

    Args:
        model: in evaluation mode. tokenizer: the model's own.
        texts: with the tokenizer's mask token, or "[MASK]", at least once each. Other special tokens that they spell
            out are such.
        top_k: fillings of each gap, 1 or more.
        at_once: every token of a gap is filled as all are hidden, as a model saw them in training whose words were
            hidden whole. A filling's probability is then the product of independent ones.

    Returns:
        For every text, for every gap, at most `top_k` fillings, the likeliest first.

    Raises:
        ValueError: a text without [MASK], or longer than the model takes; ids that the model has no row for.
    """
    gaps = [_gaps(text, model, tokenizer) for text in texts]
    beams = {(i, j): [((), 0.0)] for i, some in enumerate(gaps) for j in range(len(some))}
    special, width = torch.tensor(special_ids(tokenizer)), max(BEAM, 4 * top_k)
    for piece in range(max((len(gap.places) for some in gaps for gap in some), default=0)):
        growing = [key for key in beams if len(gaps[key[0]][key[1]].places) > piece]
        wanted = [(key, ids) for key in growing for ids in ([()] if at_once else [ids for ids, _ in beams[key]])]
        sequences, places = [], []
        for (i, j), ids in wanted:
            gap = gaps[i][j]
            sequences.append(list(gap.ids))
            for place, token in zip(gap.places, ids, strict=False):
                sequences[-1][place] = token
            places.append(gap.places[piece])
        found = dict(zip(wanted, likeliest(model, sequences, places, special, width), strict=True))
        for key in growing:
            rows = [(ids, score, found[key, () if at_once else ids]) for ids, score in beams[key]]
            grown = [((*ids, token), score + more) for ids, score, row in rows for token, more in row]
            beams[key] = sorted(grown, key=lambda each: -each[1])[:width]

    def words(beam: list) -> list[Filled]:
        best = [(ids, torch.tensor(score, dtype=torch.float64).exp().item()) for ids, score in beam[:top_k]]
        return [Filled(_text(tokenizer, ids), probability, ids) for ids, probability in best]

    return [[words(beams[i, j]) for j in range(len(some))] for i, some in enumerate(gaps)]


def _gaps(text: str, model: PreTrainingModel, tokenizer: Tokenizer) -> list[_Gap]:
    mask = special_ids(tokenizer).mask
    token = tokenizer.id_to_token(mask)
    ids = tokenizer.encode(text.replace(MASK, token)).ids
    places = [place for place, i in enumerate(ids) if i == mask]
    if not places:
        raise ValueError(f"a text has no gap to fill: write {token} where a token is wanted; got {text!r}")
    if len(ids) > model.config.longest:
        raise ValueError(
            f"a text has {len(ids):,} tokens, and the model takes {model.config.longest}: shorten {text[:40]!r}..."
        )
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {max(ids)}, and the model has {model.config.vocab_size} words: they do not "
            "belong together"
        )
    cuts = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
    return [_Gap(ids, places[a:b]) for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True)]


def likeliest(
    model: PreTrainingModel, sequences: list[list[int]], places: list[int], special: torch.Tensor, width: int
) -> list[list[tuple[int, float]]]:
    """Of every sequence the `width` likeliest tokens at its place with the logarithms of their probabilities.

    The probabilities are those among all tokens; the ids in `special` are left out.
    """
    encoded = [Encoded(ids, [0] * len(ids), False) for ids in sequences]
    device, sizes = model.word_embeddings.device, model.config
    found: list[list[tuple[int, float]]] = [[] for _ in sequences]
    for batch in batches_by_length(encoded, BATCH_TOKENS):
        packed = pack([encoded[i] for i in batch], sizes.pad_token_id, sizes.type_vocab_size, sizes.longest)
        at = packed.cu_seqlens[: len(batch)].long() + torch.tensor([places[i] for i in batch])
        logits = model(**packed.arguments(device), masked_positions=at.to(device)).prediction_logits
        scores = logits[: len(batch)].double().log_softmax(-1)
        scores[:, special.to(device)] = -torch.inf
        best, tokens = scores.topk(min(width, scores.shape[1] - len(special)), -1)
        for i, row, score in zip(batch, tokens.tolist(), best.tolist(), strict=True):
            found[i] = list(zip(row, score, strict=True))
    return found


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """As it is read: without the spaces that a decoder puts between Chinese characters."""
    return "".join(cut_at_spaces(tokenizer.decode(list(ids)))) or tokenizer.id_to_token(ids[0])
