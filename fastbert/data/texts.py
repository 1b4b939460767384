"""Texts that stand by themselves, one a row or line, with what belongs to each: a second text, a label."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.data.compressed import kind
from fastbert.data.encodings import open_text
from fastbert.data.sources import TEXTS, find_files
from fastbert.data.tables import TABLES, Quoting, is_json, is_parquet, open_table, parquet_texts, table_rows


class Texts(NamedTuple):
    """N texts of a file, in its order.

    Attributes:
        lines: where each begins, from 1.
        texts: the texts.
        pairs: second texts; None without.
        labels: as they are written, without white space around them; None without.
    """

    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | None


def read_texts(
    path: Path,
    text: str | None,
    pair: str | None = None,
    label: str | None = None,
    *,
    separator: str | None = None,
    quoting: Quoting = "auto",
) -> Texts:
    """Reads the rows of a table, or the lines of a text file, empty ones too.

    Args:
        path: a table, see `corpus.iter_documents`, or a text file.
        text, pair, label: names of its columns; `text` is None for a text file, which has no others.
        separator, quoting: see `column_texts`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a table without `text`, columns with a text file, a folder, a table that does not hold, no row.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give one file, a table or a text file with a text a line")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a table, or a text file with a text a line")
    find_files(path, text, separator, option="--text")
    if text is None:
        if pair or label:
            raise ValueError(f"{path} is read as plain text, which has no columns: name its column of text too")
        with open_text(path) as stream:
            texts = [line.rstrip("\n") for line in stream]
        _expect_rows(path, texts)
        return Texts(list(range(1, len(texts) + 1)), texts, None, None)
    with open_table(path) as stream:
        columns = [text] if pair is None else [text, pair]
        rows = list(table_rows(path, stream, columns, [] if label is None else [label], separator, quoting))
    _expect_rows(path, rows)
    pairs = None if pair is None else [row.cells[1] for row in rows]
    labels = None if label is None else [row.cells[-1].strip() for row in rows]
    return Texts([row.line for row in rows], [row.cells[0] for row in rows], pairs, labels)


def iter_texts(
    path: Path, text: str | None, *, separator: str | None = None, quoting: Quoting = "auto"
) -> Iterator[str]:
    """The texts of a table's column `text` or of a text file's or folder's lines, one at a time, empty ones left out.

    A file is read as its name says: `text`, `separator` and `quoting` are of tables alone.

    Raises:
        FileNotFoundError: no such path, or a folder without text files. Raised by the call.
        ValueError: a table that does not hold, text that is not UTF-8 (while iterating).
    """
    is_table = kind(path) in TABLES or (separator is not None and kind(path) not in TEXTS)
    column = text if is_table and not path.is_dir() else None
    separator = separator if column is not None and not is_json(path, None) and not is_parquet(path) else None
    files = find_files(path, column, separator, option="--text").read

    def of(file: Path) -> Iterator[str]:
        if is_parquet(file):
            yield from parquet_texts(file, column)
        elif column is None:
            with open_text(file) as stream:
                yield from stream
        else:
            with open_table(file) as stream:
                yield from (row.cells[0] for row in table_rows(file, stream, [column], (), separator, quoting))

    return (stripped for file in files for each in of(file) if (stripped := each.strip()))


def _expect_rows(path: Path, rows: Sequence[object]) -> None:
    if not rows:
        raise ValueError(f"{path} holds no text: expected at least one row")


class Encoded(NamedTuple):
    """A text's, or a pair's, ids and token types with special tokens, and whether something was cut off."""

    ids: list[int]
    type_ids: list[int]
    cut: bool


def encode(tokenizer: Tokenizer, texts: Texts, longest: int, words: int) -> list[Encoded]:
    """Tokenises all texts; of those beyond `longest` tokens the longer one of a pair is cut at its end.

    Special tokens that a text spells out are read as text.

    Args:
        tokenizer: left as it is.
        texts: N texts or pairs.
        longest: most tokens of a text or pair, special ones included.
        words: rows of the model's word embedding.

    Returns:
        N of `Encoded`, in the order of the texts.

    Raises:
        ValueError: a text of which the tokenizer makes no token, not even [CLS]; an id that the model has no row for.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the next lines change it
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    tokenizer.encode_special_tokens = True
    given = texts.texts if texts.pairs is None else list(zip(texts.texts, texts.pairs, strict=True))
    encoded = [Encoded(e.ids, e.type_ids, bool(e.overflowing)) for e in tokenizer.encode_batch(given)]
    if bad := [line for line, each in zip(texts.lines, encoded, strict=True) if not each.ids]:
        raise ValueError(
            f"the tokenizer makes no token of {len(bad):,} texts, the first in line {bad[0]:,}, and puts none around "
            "them: take them out"
        )
    highest = max((max(each.ids) for each in encoded), default=0)
    if highest >= words:
        raise ValueError(
            f"the tokenizer gives ids up to {highest}, and the model has {words} words: they do not belong together"
        )
    return encoded


class PackedTexts(NamedTuple):
    """B texts and one of padding with T tokens in all, one after another; the arguments of an encoder's `forward`.

    Attributes:
        input_ids: int64 [T]. token_type_ids: int64 [T].
        cu_seqlens: int32 [B + 2], text b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: tokens of the longest.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def arguments(self, device: str | torch.device) -> dict[str, Tensor | int]:
        """By name, with the tensors on `device`."""
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self._asdict().items()}


def pack(encoded: Sequence[Encoded], pad_id: int | None, types: int, longest: int, multiple: int = 64) -> PackedTexts:
    """Packs texts without padding between them.

    Behind them stands one sequence of padding that fills T up to a multiple of 64: a CPU's product library prepares
    code for every new shape, which costs more than a small model's step. Of another `multiple` the sequence is shorter.

    Args:
        pad_id: the id of the padding, 0 where it is None.
        types: token types that the model has; higher ones become its last.
        longest: tokens of the model's longest sequence.
    """
    lengths = torch.tensor([len(each.ids) for each in encoded])
    padding = -int(lengths.sum()) % min(multiple, longest)
    ids = [i for each in encoded for i in each.ids] + [pad_id or 0] * padding
    kinds = [i for each in encoded for i in each.type_ids] + [0] * padding
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0), torch.tensor([len(ids)])]).int()
    return PackedTexts(
        torch.tensor(ids), torch.tensor(kinds).clamp(max=types - 1), cu_seqlens, max(int(lengths.max()), padding)
    )


def batches_by_length(encoded: Sequence[Encoded], tokens: int) -> list[list[int]]:
    """Places of texts in batches of at most so many tokens, or of one text, the longest texts first."""
    batches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        size = len(encoded[place].ids)
        if size > room:
            batches.append([])
            room = tokens
        batches[-1].append(place)
        room -= size
    return batches
