"""A run that goes on from a model folder: what it takes from there, and words that the folder's tokenizer lacks.

The run keeps its own copy in `init/`: the model with a row for each new word, `words.json` with their ids. So it can be
resumed when the folder is gone.
"""

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from fastbert import files
from fastbert.data.encodings import open_text
from fastbert.data.tokenizer import is_wide, load_tokenizer, special_ids, vocab_size
from fastbert.models import checkpoint
from fastbert.models.auto import PRETRAINED, class_of
from fastbert.models.pretraining import PreTrainingModel
from fastbert.pretrain.settings import PretrainConfig

COPY = "init"  # in the run's folder
WORDS = "words.json"
# What the folder decides.
_ITS_OWN = (
    "model", "preset", "tokenizer", "vocab_size", "lowercase", "max_position_embeddings", "attention_window",
    "attention_kind", "norm",
)  # fmt: skip


def take_settings(config: PretrainConfig) -> PretrainConfig:
    """The settings of a new run with those of the folder `config.init`, which is read whole before a run is written.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a folder that does not hold, an architecture that is not here, a setting that the folder decides,
            a tokenizer that does not belong to the model or lacks special tokens, words that do not hold.
    """
    kind = class_of(config.init, PRETRAINED)
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in _ITS_OWN if getattr(config, name) not in (usual[name], kind.names.model_type)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"with --init the folder {config.init} decides {flags}: leave that out")
    sizes = kind.from_pretrained(config.init).config
    longest = sizes.longest
    if config.task_type is not None and not getattr(sizes, "use_task_id", False):
        raise ValueError(f"the model in {config.init} has no task types (use_task_id): leave --task-type out")
    extended_tokenizer(config)
    seq_len = max(phase.seq_len for phase in config.all_phases())
    if seq_len > longest:
        raise ValueError(
            f"seq_len must be at most what the model in {config.init} takes, {longest} tokens, got {seq_len}"
        )
    first = config.attention_temperature
    if first is None and sizes.attention_kind != "soft":
        first = sizes.attention_temperature
    return dataclasses.replace(
        config, model=kind.names.model_type, max_position_embeddings=longest, norm=sizes.norm,
        attention_kind=sizes.attention_kind, attention_temperature=first,
    )  # fmt: skip


def extended_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The folder's tokenizer with the new words of `config.add_words`, their ids behind all others."""
    tokenizer = load_tokenizer(config.init)
    special_ids(tokenizer)
    size, rows = vocab_size(tokenizer), checkpoint.read_config(config.init)["vocab_size"]
    if size > rows:
        raise ValueError(
            f"the tokenizer in {config.init} has ids up to {size - 1}, and the model {rows} words: they do not belong "
            "together"
        )
    if config.add_words is not None:
        tokenizer.add_tokens([_token(word, tokenizer) for word in new_words(config.add_words, tokenizer)])
    return tokenizer


def new_words(path: Path, tokenizer: Tokenizer) -> list[str]:
    """The words in a text file, one a line, that the tokenizer does not have as one token yet; each once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no text, no word, none that is new, or one of which the tokenizer's normalizer leaves nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the words {path} do not exist: give a text file with one a line (--add-words)")
    with open_text(path) as stream:
        words = [line.strip() for line in stream if line.strip()]
    if not words:
        raise ValueError(f"{path} holds no word: expected one a line (--add-words)")
    normalizer, unk = tokenizer.normalizer, special_ids(tokenizer).unk
    by_form: dict[str, str] = {}
    for word in words:
        form = word if normalizer is None else normalizer.normalize_str(word)
        if not form.strip():
            raise ValueError(f"{path} holds {word!r}, of which the tokenizer leaves nothing: take it out")
        alone = tokenizer.encode(word, add_special_tokens=False).ids
        if not any(len(ids) == 1 and ids != [unk] for ids in (alone, pieces(word, tokenizer))):
            by_form.setdefault(form, word)
    if not by_form:
        raise ValueError(f"the tokenizer has every word of {path} already: leave --add-words out")
    return list(by_form.values())


def pieces(word: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer reads a word as within a text.

    Published RoBERTas have most words with the space before them as one token, and without it as another or several.
    """
    spaced = isinstance(tokenizer.model, models.BPE) and not any(map(is_wide, word))
    return tokenizer.encode(f" {word}" if spaced else word, add_special_tokens=False).ids


def _token(word: str, tokenizer: Tokenizer) -> AddedToken:
    """As a word by itself, not within others, unless it is of a script without spaces; in BPE with the space before."""
    apart = not any(map(is_wide, word))
    return AddedToken(word, single_word=apart, lstrip=isinstance(tokenizer.model, models.BPE), normalized=True)


def write_copy(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the run's copy of the folder's model, with rows for the words that only `tokenizer` has.

    A new row is the mean of the rows of the pieces that the word was read as before.
    """
    torch.manual_seed(config.seed)  # of heads that the folder lacks
    model, before = PRETRAINED[config.model].from_pretrained(config.init), load_tokenizer(config.init)
    known, vocab = before.get_vocab(), tokenizer.get_vocab()
    words = {word: i for word, i in sorted(vocab.items(), key=lambda item: item[1]) if word not in known}
    if config.add_words is not None:
        print(f"words new to the tokenizer: {len(words):,}, such as {', '.join(list(words)[:5])}")
    state, table = model.state_dict(), model.word_embeddings
    names = {name for name, x in state.items() if x.data_ptr() in (table.data_ptr(), model.predictions.bias.data_ptr())}
    rows = max(len(table), vocab_size(tokenizer))
    for name in names:
        grown = torch.cat([state[name], state[name].new_zeros(rows - len(table), *state[name].shape[1:])])
        for word, i in words.items():
            grown[i] = state[name][pieces(word, before)].mean(0)
        state[name] = grown
    changed = {"vocab_size": rows}
    if config.dropout is not None:
        of_encoders = "hidden_dropout_prob", "attention_probs_dropout_prob"
        changed |= dict.fromkeys(("dropout",) if config.model == "elmo" else of_encoders, config.dropout)
    if config.attention_temperature is not None:
        changed["attention_temperature"] = config.attention_temperature
    model = type(model)(dataclasses.replace(model.config, **changed))
    model.load_state_dict(state)
    with files.whole_folder(config.output / COPY) as folder:
        model.save_pretrained(folder)
        (folder / WORDS).write_text(files.json_text(words, indent=2))


def read_copy(config: PretrainConfig) -> tuple[PreTrainingModel, Tensor]:
    """The model in the run's copy, and the ids of its new words, int64 [words].

    Raises:
        ValueError: the copy is gone or damaged.
    """
    folder = config.output / COPY
    try:
        words = json.loads((folder / WORDS).read_text())
        model = PRETRAINED[config.model].from_pretrained(folder)
        return model, torch.tensor(list(words.values()), dtype=torch.int64)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder}, the run's copy of the model that it went on from, cannot be used: {error}. Put it back as it "
            "was, or start a new run in another --output"
        ) from error
