"""Hugging Face folders: a model's configuration, weights and tokenizer, read and written.

The decoder is tied to the word embedding and is stored once, as that.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import extras, files, tokenizer_files
from fastbert.models import parameter_names
from fastbert.models.parameter_names import Names

# Before model_type where norms are not LayerNorm: `transformers`, which has no others, would not notice it otherwise.
OWN = "fastbert-"
UNTRAINED = "newly initialised, to be trained"  # what a folder lacks
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Before the encoder's names in a folder whose configuration does not name its kind, beside the model's own name;
# another model's would be "roberta".
_WRAPPERS = ("", "module", "model", "_orig_mod")


def load(folder: str | os.PathLike, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a Hugging Face folder of one architecture.

    Args:
        folder: holds config.json and model.safetensors, or pytorch_model.bin where there is no safetensors file.
        names: the architecture's.

    Returns:
        config.json's fields, and the tensors by the names in the file.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: another architecture, one with features this package does not have, or a file that is damaged.
    """
    path = Path(folder) / "config.json"
    fields = read_config(folder)
    _check_fields(fields, path, names)
    tensors = read_tensors(Path(folder))
    if fields.get("model_type") is None:
        prefix = parameter_names.encoder_prefix(list(tensors), folder, names)
        if prefix.rstrip(".").rpartition(".")[2] not in (names.encoder, *_WRAPPERS):
            raise ValueError(
                f'{path} names no "model_type" and the weights stand under {prefix!r}: where this is {names.article}, '
                f'add "model_type": "{names.model_type}"'
            )
    return fields, tensors


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of a folder's config.json, of whatever architecture; raises as `load` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}: models are loaded from folders, not by a hub's name; "
            "`hf download google-bert/bert-base-uncased --local-dir bert-base-uncased` fetches one"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder written by save_pretrained, with config.json and "
            "model.safetensors"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or export the folder anew") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object with a model's sizes, got {type(fields).__name__}")
    if isinstance(fields.get("model_type"), str):
        fields["model_type"] = fields["model_type"].removeprefix(OWN)
    return fields


def _check_fields(fields: dict[str, Any], path: Path, names: Names) -> None:
    """Raises ValueError unless the configuration is of a model that can be loaded; old ones do not name their kind."""
    kind, classes, model = fields.get("model_type"), fields.get("architectures") or [], names.model_type.upper()
    sized = {"vocab_size", "hidden_size", "num_hidden_layers"} <= fields.keys()
    titled = all(str(name).startswith(names.title) for name in classes)
    if kind != names.model_type and (kind is not None or not sized or not titled):
        inner = path.parent / "model"
        if kind is None and (inner / path.name).exists():
            raise ValueError(f"{path.parent} is the folder of a run, and its model is in {inner}: name that folder")
        raise ValueError(
            f'{path} must say "model_type": "{names.model_type}", got {kind or classes or None!r}: this folder holds '
            "another kind of model; fastbert.AutoModel loads those that there are"
        )
    for name, supported in names.fixed.items():
        if fields.get(name, supported) != supported:
            raise ValueError(f"{path} says {name} = {fields[name]!r}; this {model} has {name} = {supported!r} only")
    if fields.get("pruned_heads"):
        raise ValueError(
            f"{path} says pruned_heads = {fields['pruned_heads']}: layers lost some of their heads; this {model} has "
            "num_attention_heads in every layer"
        )
    if fields.get("quantization_config"):
        raise ValueError(
            f"{path} says quantization_config = {fields['quantization_config']}: the weights are quantised, and this "
            f"{model} reads floating point only; save them with transformers' "
            "model.dequantize().save_pretrained(folder)"
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weights by the names in the file; raises as `load` does."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    for path in (safe, pickled):
        files.refuse_lfs_pointer(path)
    if safe.is_file():
        safetensors = _safetensors()
        try:
            return safetensors.load_file(safe)
        except Exception as error:  # safetensors' own class, which is a plain Exception
            raise ValueError(f"{safe} is damaged or cut short ({error}): fetch or export it anew") from error
    if pickled.is_file():
        try:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling and unzipping raise
            raise ValueError(f"{pickled} is damaged, cut short or no plain state dict ({error})") from error
        if not isinstance(tensors, dict):
            raise ValueError(
                f"{pickled} is no plain state dict: expected tensors by name, got {type(tensors).__name__}"
            )
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{pickled} is no plain state dict: expected tensors by name, {name!r} is {type(value).__name__}"
                )
        return tensors
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin: a model in several files, or in another "
        "framework's, is saved as one by transformers' save_pretrained(folder, max_shard_size='100GB')"
    )


def _safetensors() -> Any:
    if why := extras.missing("reading and writing model folders needs", "safetensors"):
        raise ImportError(why)
    import safetensors.torch

    return safetensors.torch


def assign(model: nn.Module, tensors: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Copies tensors under Hugging Face's names into the model, which is not touched unless all of them fit.

    A pooler or a head that the checkpoint lacks keeps its fresh weights, and a warning names them; so does one for
    tensors that the model has no place for. An encoder leaves heads, and one without a pooler leaves that, out without
    a word.

    Args:
        model: an encoder, or one with heads.
        tensors: by name; dtypes are converted to the model's.
        source: where they come from, for messages.

    Raises:
        ValueError: an encoder weight is missing, a shape differs, a weight is quantised or not finite, there is a scale
            or an adapter beside a weight, or the decoder is not tied to the word embedding.
    """
    names = model.names
    state = model.state_dict()
    expected = parameter_names.to_hugging_face(state, names)
    with_heads = names.embedding in expected
    pooler = f"{names.base}pooler."
    wanted = {name if with_heads else names.base + name for name in expected}
    given = parameter_names.normalize(tensors, source, names)
    if not with_heads:  # the heads are nobody's here, but the decoder may be all there is of the word embedding
        kept = () if names.embedding in given else (names.decoder,)
        given = {name: x for name, x in given.items() if name in kept or not name.startswith(names.heads)}
    if not any(name.startswith(pooler) for name in wanted):
        given = {name: x for name, x in given.items() if not name.startswith(pooler)}
    _check_tensors(given, wanted | {names.decoder, names.decoder_bias}, source)
    _tie(given, names.embedding, names.decoder, source)
    _tie(given, names.bias, names.decoder_bias, source)
    if not with_heads:
        given = {name.removeprefix(names.base): x for name, x in given.items()}
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    # What a checkpoint may lack, because the model it was saved from had no such part.
    optional = ("pooler.", pooler, *names.heads)
    absent = [name for name in missing if not name.startswith(optional)]
    if absent:
        raise ValueError(
            f"{source} lacks {_list(absent)}: it does not hold the encoder that its config.json describes; fetch or "
            "export both anew"
        )
    for name, tensor in given.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(expected[name].shape)}; weights and configuration belong to different models"
            )
    if missing:
        warnings.warn(f"{source} lacks {_list(missing)}: {UNTRAINED}", stacklevel=3)
    if unexpected:
        warnings.warn(f"{source} has {_list(unexpected)}, which {type(model).__name__} has no use for", stacklevel=3)
    named = {name: given.get(name, expected[name]).to(expected[name].dtype) for name in expected}
    model.load_state_dict(parameter_names.from_hugging_face(named, state, names))


def check_finite(name: str, tensor: Tensor, source: str | os.PathLike) -> None:
    """Raises ValueError where a weight holds what is no number."""
    if not tensor.float().isfinite().all():
        raise ValueError(
            f"{source}: {name} holds NaN or infinity: its training diverged or the file is damaged; take an earlier "
            "checkpoint"
        )


def _check_tensors(given: dict[str, Tensor], wanted: set[str], source: str | os.PathLike) -> None:
    """Raises ValueError where the numbers in `wanted` tensors are not the weights themselves."""
    for name in (x for x in given if x in wanted):
        tensor = given[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{source}: {name} is {tensor.dtype}, a quantised weight, and floating point alone is read; "
                "save the model with transformers' model.dequantize().save_pretrained(folder)"
            )
        check_finite(name, tensor, source)
    modules = {name.rpartition(".")[0] for name in wanted}
    for name in (x for x in given if x not in wanted):
        if _parents(name) & modules:
            raise ValueError(
                f"{source} has {name} beside a weight that the model has: the weight alone (quantised, or with an "
                "adapter to be added) is not the model's; merge or dequantise it and save it anew"
            )


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _tie(named: dict[str, Tensor], kept: str, twin: str, source: str | os.PathLike) -> None:
    """Leaves one of two tensors that are the same parameter; they may differ by the rounding of the coarser dtype."""
    other = named.pop(twin, None)
    if other is None:
        return
    tensor = named.setdefault(kept, other)
    coarser = min(tensor.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    if not torch.equal(tensor.to(coarser), other.to(coarser)):
        what = "the word embedding" if kept.endswith(("word_embeddings.weight", "word_embedding.weight")) else kept
        raise ValueError(f"{source}: {twin} differs from {what}; this model ties the two")


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def save(model: nn.Module, folder: str | os.PathLike, fields: dict[str, Any], tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files as `transformers` reads them.

    A model that `transformers` has not (`config.foreign`: other norms, other attention) has the `model_type`
    "fastbert-bert" (or -roberta, ...) there, and other names for the tensors of other norms: `transformers` then
    refuses it and does not compute other numbers.

    Every file is first written whole under another name and then moved into place, so that a full disk or a kill
    while writing leaves an earlier export as it was.

    Args:
        model: an encoder, or one with heads; stored in the dtype it has.
        folder: made where it does not exist.
        fields: the configuration.
        tokenizer: a `tokenizers.Tokenizer`, a folder to copy tokenizer files from, or None for none.

    Raises:
        FileNotFoundError: `tokenizer` is a folder without a tokenizer.
        TypeError: `tokenizer` is something else.
        ValueError: the tokenizer has ids beyond the model's vocabulary, or gives an id to two tokens.
        OSError: the files cannot be written.
    """
    named = parameter_names.to_hugging_face(model.state_dict(), model.names)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    kind = (OWN if model.config.foreign else "") + model.names.model_type
    config = {"architectures": [type(model).__name__], "model_type": kind, "dtype": dtype} | fields
    write(folder, config | dict(model.names.fixed) | {"tie_word_embeddings": True}, named, model.config, tokenizer)


def write(
    folder: str | os.PathLike, fields: dict[str, Any], named: dict[str, Tensor], sizes: Any, tokenizer: Any = None
) -> None:
    """Writes what `save` says, of any model: config.json with `fields`, the `named` tensors and the tokenizer.

    `sizes` has the model's `vocab_size` and `longest`. Raises as `save`.
    """
    folder = Path(folder)
    tensors = {name: x.detach().cpu().contiguous() for name, x in named.items()}
    contents = {
        "config.json": (files.json_text(dict(sorted(fields.items())), 2) + "\n").encode(),
        "model.safetensors": _safetensors().save(tensors, metadata={"format": "pt"}),
    }
    tokenizer_contents = _tokenizer_files(tokenizer, sizes)
    files.write(folder, contents | tokenizer_contents)
    if tokenizer is not None:
        tokenizer_files.remove_others(folder, tokenizer_contents)


def _tokenizer_files(tokenizer: Any, config: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | os.PathLike):
        return tokenizer_files.read(tokenizer)
    contents = tokenizer_files.make(tokenizer, config.longest, config.padding_side)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer's token {token!r} has id {highest}, but the model's vocab_size is {config.vocab_size}: "
            "save the tokenizer that the model was trained with"
        )
    return contents
