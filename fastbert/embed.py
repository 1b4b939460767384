"""Vectors of texts by an encoder's folder: what `fastbert embed` runs."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from fastbert import allocator, files
from fastbert.data.tables import Quoting
from fastbert.data.texts import Encoded, PackedTexts, batches_by_length, encode, pack, read_texts
from fastbert.data.tokenizer import load_tokenizer
from fastbert.models.auto import AutoModel
from fastbert.models.elmo import ElmoModel
from fastbert.models.encoder import Encoder
from fastbert.models.features import hidden_states
from fastbert.models.frozen import freeze
from fastbert.pretrain.settings import check_device, expect

Vectors = Literal["mean", "cls", "tokens"]
SUFFIXES = (".npy", ".safetensors")


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """Settings of `fastbert embed`; its --help shows them."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, of this program or of transformers."""
    file: Annotated[Path, tyro.conf.Positional]
    """A text file with a text a line, or a table with a column of text."""
    output: Path
    """Where to write the vectors, in the file's order: .npy or .safetensors."""
    text: str | None = None
    """The table's column with the text."""
    vectors: Vectors = "mean"
    """One vector a text, the mean over its tokens or that of its first, [CLS]; or all tokens', in .safetensors."""
    layers: tuple[int, ...] = (-1,)
    """Which layers' outputs to average: -1 the last one's, 0 the embeddings, as in transformers' hidden_states."""
    normalize: bool = False
    """Give every vector the length 1."""
    seq_len: int | None = None
    """Tokens at which texts are cut off; if not given what the model takes."""
    separator: str | None = None
    """The character between a table's columns; if not given a comma, in .tsv files a tab."""
    quoting: Quoting = "auto"
    """How a table's cells are quoted: double, backslash, none; auto looks at the header."""
    batch_tokens: int = 4096
    """Tokens computed at a time."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); vectors are float32 all the same."""
    device: str = "cpu"
    """Where to compute, as torch names it."""

    def check(self) -> None:
        """Raises ValueError where a setting does not hold."""
        expect(self.vectors in get_args(Vectors), "vectors", f"one of {', '.join(get_args(Vectors))}", self.vectors)
        ending = f"a file that ends in {' or '.join(SUFFIXES)}"
        expect(self.output.suffix in SUFFIXES, "output", ending, str(self.output))
        if self.vectors == "tokens" and self.output.suffix == ".npy":
            raise ValueError("texts have different numbers of tokens, which .npy has no form for: write .safetensors")
        if not self.output.absolute().parent.is_dir():
            raise ValueError(f"the folder of {self.output} does not exist: make it, or choose another --output")
        for name, low in (("batch_tokens", 1), ("seq_len", 3)):
            value = getattr(self, name)
            holds = (type(value) is int and value >= low) or (value is None and name == "seq_len")
            expect(holds, name, f"an integer from {low} on", value)
        check_device(self.device)


def embed(config: EmbedConfig) -> None:
    """Writes the vectors of every row of the table, or line of the text file, in its order; of empty texts too.

    `.npy` holds float32 [N, H]. `.safetensors` holds `vectors`, float32 [N, H]; of tokens [T, H], and beside them
    `cu_seqlens`, int64 [N + 1], text n being vectors cu_seqlens[n] to cu_seqlens[n + 1], and `input_ids`, int64 [T],
    special tokens among them. The file appears whole or not at all.

    Raises:
        FileNotFoundError, ValueError, OSError: settings, folder or file that do not hold, before anything is written.
    """
    config.check()
    allocator.keep_memory()
    texts = read_texts(config.file, config.text, separator=config.separator, quoting=config.quoting)
    model = AutoModel.from_pretrained(config.folder, add_pooling_layer=False).to(config.device)
    sizes = model.config
    layers = wanted_layers(config.layers, sizes.num_hidden_layers)
    longest = sizes.longest if config.seq_len is None else config.seq_len
    expect(longest <= sizes.longest, "seq_len", f"at most what the model takes, {sizes.longest}", longest)
    encoded = encode(load_tokenizer(config.folder), texts, longest, sizes.vocab_size)
    cut = sum(each.cut for each in encoded)
    if cut:
        print(f"{cut:,} of {len(encoded):,} texts are cut at {longest} tokens")
    if torch.device(config.device).type == "cpu" and not isinstance(model, ElmoModel):
        freeze(model, torch.bfloat16 if config.bf16 else None)

    lengths = np.fromiter((len(each.ids) for each in encoded), np.int64, len(encoded))
    bounds = np.append(0, np.cumsum(lengths))
    rows = bounds[-1] if config.vectors == "tokens" else len(encoded)
    with _whole_file(config.output) as path:
        vectors = _allocate(path, config.output.suffix, int(rows), sizes.hidden_size)
        for places, some in _batches(model, encoded, layers, config):
            if config.vectors == "tokens":
                for place, each in zip(places, some, strict=True):
                    vectors[bounds[place] : bounds[place + 1]] = each
            else:
                vectors[places] = some
        _finish(path, vectors, config.vectors == "tokens", bounds, encoded)
    print(f"{rows:,} vectors of {sizes.hidden_size} numbers in {config.output}")


def wanted_layers(layers: Sequence[int], depth: int) -> list[int]:
    """The layers counted from 0, the embeddings, to `depth`; ValueError for one that the model does not have."""
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"layers must lie from {-depth - 1} to {depth}, as the model has {depth}, got {layer}")
    if not layers:
        raise ValueError("layers must name one or more, such as -1 for the last")
    return [layer % (depth + 1) for layer in layers]


def _batches(
    model: Encoder | ElmoModel, encoded: list[Encoded], layers: list[int], config: EmbedConfig
) -> Iterator[tuple[list[int], np.ndarray | list[np.ndarray]]]:
    """Places of texts and their vectors, [places, H], or of tokens [tokens, H] for each text."""
    sizes = model.config
    bar = tqdm(total=len(encoded), desc="embedding", unit="text", dynamic_ncols=True)
    autocast = torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)
    with torch.inference_mode(), bar:
        for places in batches_by_length(encoded, config.batch_tokens):
            some = [encoded[i] for i in places]
            packed = pack(some, sizes.pad_token_id, sizes.type_vocab_size, sizes.longest)
            with autocast:
                states = hidden_states(model, packed.arguments(config.device))
            hidden = torch.stack([states[layer].float() for layer in layers]).mean(0)  # [T, H]
            yield places, _pooled(hidden, packed, len(some), config)
            bar.update(len(some))


def _pooled(hidden: Tensor, packed: PackedTexts, texts: int, config: EmbedConfig) -> np.ndarray | list[np.ndarray]:
    bounds = packed.cu_seqlens[: texts + 1].long()
    lengths = bounds.diff()
    hidden = hidden[: bounds[-1]]
    if config.vectors == "cls":
        hidden = hidden[bounds[:-1].to(hidden.device)]
    elif config.vectors == "mean":
        hidden = torch.segment_reduce(hidden, "mean", lengths=lengths.to(hidden.device))
    if config.normalize:
        hidden = torch.nn.functional.normalize(hidden, dim=-1)
    vectors = hidden.cpu().numpy()
    return np.split(vectors, bounds[1:-1]) if config.vectors == "tokens" else vectors


# ---- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, moved to `path` when the block ends well and removed when it does not."""
    path = path.absolute()
    writing = path.with_name(f".{path.name}{files.WRITING}")
    try:
        with files.naming(path, "what was there before is unchanged"):
            yield writing
            files.flush(writing)
            os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def _allocate(path: Path, suffix: str, rows: int, size: int) -> np.ndarray:
    """Room for the vectors: the file itself for .npy, which need not fit in memory."""
    if suffix == ".npy":
        return np.lib.format.open_memmap(path, "w+", np.float32, (rows, size))
    return np.empty((rows, size), np.float32)


def _finish(path: Path, vectors: np.ndarray, are_tokens: bool, bounds: np.ndarray, encoded: list[Encoded]) -> None:
    if isinstance(vectors, np.memmap):
        vectors.flush()
        return
    from safetensors.numpy import save_file

    ids = np.fromiter((i for each in encoded for i in each.ids), np.int64, int(bounds[-1]))
    save_file({"vectors": vectors} | ({"cu_seqlens": bounds, "input_ids": ids} if are_tokens else {}), path)
