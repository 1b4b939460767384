"""Hugging Face folders: their files, and their parameter names <-> ours.

Our names are Hugging Face's but for one thing: query, key and value are one matrix, `attention.self.qkv`. Files of old
say gamma and beta for a LayerNorm's weight and bias, leave out the prefix `bert.` where only the encoder was saved, and
carry `position_ids`; all of that is read. The decoder is tied to the word embedding and is stored once, as that.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import files

_PREFIX, _HEADS = "bert.", "cls."
_QKV, _PARTS = ".attention.self.qkv.", (".attention.self.query.", ".attention.self.key.", ".attention.self.value.")
_DECODER, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_EMBEDDING, _BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
# What a checkpoint may lack, because the model it was saved from had no such part.
_OPTIONAL = ("pooler.", "bert.pooler.", "cls.")
# What this BERT does not do, by configuration field: the values it can take as they are.
_SUPPORTED = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def load(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a Hugging Face BERT folder.

    Args:
        folder: holds config.json and model.safetensors, or pytorch_model.bin where there is no safetensors file.

    Returns:
        config.json's fields, and the tensors by the names in the file.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: not a BERT, one with features this package does not have, or a file that is damaged.
    """
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
    if not isinstance(fields, dict) or fields.get("model_type") != "bert":
        found = fields.get("model_type") if isinstance(fields, dict) else None
        raise ValueError(
            f'{path} must say "model_type": "bert", got {found!r}: this folder holds another kind of model'
        )
    for name, supported in _SUPPORTED.items():
        if fields.get(name, supported[0]) not in supported:
            raise ValueError(f"{path} says {name} = {fields[name]!r}; this BERT has {name} = {supported[0]!r} only")
    return fields, _read_tensors(folder)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        safetensors = _safetensors()
        try:
            return safetensors.load_file(safe)
        except Exception as error:  # safetensors' own class, which is a plain Exception
            raise ValueError(f"{safe} is damaged or cut short ({error}): fetch or export it anew") from error
    if pickled.is_file():
        try:
            return torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling and unzipping raise
            raise ValueError(f"{pickled} is damaged, cut short or no plain state dict ({error})") from error
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin: a model in several files, or in another "
        "framework's, is saved as one by transformers' save_pretrained(folder, max_shard_size='100GB')"
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'reading and writing model folders needs: pip install "fastbert-kernels[pretrain]"'
        ) from error
    return safetensors.torch


def assign(model: nn.Module, tensors: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Copies tensors under Hugging Face's names into the model, which is not touched unless all of them fit.

    A pooler or a pretraining head that the checkpoint lacks keeps its fresh weights, and a warning names them; so does
    one for tensors that the model has no place for. `BertModel` leaves the pretraining heads out without a word.

    Args:
        model: a `BertModel` or `BertForPreTraining`.
        tensors: by name; dtypes are converted to the model's.
        source: where they come from, for messages.

    Raises:
        ValueError: an encoder weight is missing, a shape differs, or the decoder is not tied to the word embedding.
    """
    state = model.state_dict()
    expected = to_hugging_face(state)
    given = _normalize(tensors, with_heads=_EMBEDDING in state, source=source)
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    absent = [name for name in missing if not name.startswith(_OPTIONAL)]
    if absent:
        raise ValueError(f"{source} lacks {_list(absent)}: it does not hold the encoder that its config.json describes")
    for name, tensor in given.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(expected[name].shape)}; weights and configuration belong to different models"
            )
    if missing:
        warnings.warn(f"{source} lacks {_list(missing)}: newly initialised, to be trained", stacklevel=3)
    if unexpected:
        warnings.warn(f"{source} has {_list(unexpected)}, which {type(model).__name__} has no use for", stacklevel=3)
    model.load_state_dict(from_hugging_face({name: given.get(name, expected[name]) for name in expected}))


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: each `qkv` becomes the three views query, key and value."""
    named = {}
    for name, tensor in state.items():
        if _QKV in name:
            named |= {name.replace(_QKV, part): x for part, x in zip(_PARTS, tensor.chunk(3), strict=True)}
        else:
            named[name] = tensor
    return named


def from_hugging_face(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`; every layer must have query, key and value."""
    state = {}
    for name, tensor in named.items():
        if _PARTS[0] in name:
            state[name.replace(_PARTS[0], _QKV)] = torch.cat([named[name.replace(_PARTS[0], x)] for x in _PARTS])
        elif not any(part in name for part in _PARTS):
            state[name] = tensor
    return state


def _normalize(tensors: dict[str, Tensor], with_heads: bool, source: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors under today's names, for a model with or without pretraining heads; the tied decoder is left out."""
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):
            name = name.removesuffix("gamma").removesuffix("beta") + ("weight" if name.endswith("gamma") else "bias")
        if not name.endswith("position_ids"):
            named[name] = tensor
    prefixed = any(name.startswith(_PREFIX) for name in named)
    if not with_heads:
        return {name.removeprefix(_PREFIX): x for name, x in named.items() if not name.startswith(_HEADS)}
    if not prefixed:
        named = {name if name.startswith(_HEADS) else _PREFIX + name: x for name, x in named.items()}
    decoder = named.pop(_DECODER, None)
    if decoder is not None and _EMBEDDING in named and not torch.equal(decoder, named[_EMBEDDING]):
        raise ValueError(f"{source}: {_DECODER} differs from the word embedding; this BERT ties the two")
    if _DECODER_BIAS in named:
        named.setdefault(_BIAS, named.pop(_DECODER_BIAS))
        named.pop(_DECODER_BIAS, None)
    return named


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def save(model: nn.Module, folder: str | os.PathLike, fields: dict[str, Any], tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files as `transformers` reads them.

    Every file is first written whole under another name and then moved into place, so that a full disk or a kill
    while writing leaves an earlier export as it was.

    Args:
        model: a `BertModel` or `BertForPreTraining`; stored in the dtype it has.
        folder: made where it does not exist.
        fields: the configuration.
        tokenizer: a `tokenizers.Tokenizer`, a folder to copy tokenizer files from, or None for none.

    Raises:
        FileNotFoundError: `tokenizer` is a folder without tokenizer files.
        TypeError: `tokenizer` is something else.
        OSError: the files cannot be written.
    """
    folder = Path(folder)
    safetensors = _safetensors()
    tensors = {name: x.detach().cpu().contiguous() for name, x in to_hugging_face(model.state_dict()).items()}
    extra = {name: supported[0] for name, supported in _SUPPORTED.items()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {"architectures": [type(model).__name__], "model_type": "bert", "dtype": dtype} | fields | extra
    contents = {
        "config.json": _json(config),
        "model.safetensors": safetensors.save(tensors, metadata={"format": "pt"}),
    }
    contents |= _tokenizer_files(tokenizer)
    files.write(folder, contents)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | os.PathLike):
        paths = [Path(tokenizer) / name for name in TOKENIZER_FILES]
        found = {path.name: path.read_bytes() for path in paths if path.is_file()}
        if not found:
            raise FileNotFoundError(f"{tokenizer} has none of the tokenizer files {', '.join(TOKENIZER_FILES)}")
        return found
    if not hasattr(tokenizer, "to_str") or not hasattr(tokenizer, "token_to_id"):
        raise TypeError(f"tokenizer must be a tokenizers.Tokenizer, a folder or None, got {type(tokenizer).__name__}")
    special = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    special = {role: token for role, token in special.items() if tokenizer.token_to_id(token) is not None}
    vocabulary = tokenizer.get_vocab()
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({"tokenizer_class": "BertTokenizer"} | special),
        "vocab.txt": "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get)).encode(),
    }
