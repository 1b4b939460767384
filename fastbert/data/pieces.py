"""How the files of a corpus are cut into pieces of whole documents, for several processes to read at the same time.

Where a file is cut depends on its content and on the size of the pieces alone. Text is cut at a blank line, where there
is none within a megabyte at the end of a line; JSON lines and tables without quotes at the end of a line, Parquet
between row groups. In a table with quotes a line end may belong to a cell, so that it is read from its beginning to
find where rows end. A compressed file is decompressed once to find these places, and once more by each process.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from fastbert.data.compressed import is_compressed, opened
from fastbert.data.corpus import Piece, Reading
from fastbert.data.tables import is_parquet, may_quote, row_ends, row_group_sizes

_WINDOW = 1 << 20
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def shard_size(total: int) -> int:
    """Bytes of text in a shard of a corpus of so many bytes on disk: 64 shards, of 8 to 256 MiB each."""
    return min(max(total // 64, 1 << 23), 1 << 28)


def cut(file: Path, reading: Reading, size: int) -> list[Piece]:
    """A file in pieces of about `size` bytes, in order; ValueError where it does not hold."""
    if is_parquet(file):
        return _row_groups(file, reading.column, size)
    if not is_compressed(file) and file.stat().st_size <= size:
        return [Piece(file, 0, file.stat().st_size, file.stat().st_size)]
    if reading.column is not None and may_quote(file, reading.separator, reading.quoting):
        bounds = _first_beyond(row_ends(file, reading.separator, reading.quoting), size)
    else:
        bounds = list(_line_ends(file, size, blank=reading.column is None))
    bounds = [0, *bounds]
    end = _length(file, bounds[-1])
    bounds = [*(bound for bound in bounds if bound < end), end]
    return [Piece(file, a, b, b - a) for a, b in pairwise(bounds)]


def in_shards(pieces: Iterable[Piece], size: int) -> list[list[Piece]]:
    """Pieces in a row, together of at least `size` bytes but for the last."""
    shards: list[list[Piece]] = []
    held = size
    for piece in pieces:
        if held >= size:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.weight
    return shards


def _line_ends(file: Path, size: int, blank: bool) -> Iterator[int]:
    """Places behind a line, or behind a blank one, the first ones from each multiple of `size` on."""
    with opened(file) as stream:
        place = size
        while True:
            stream.seek(place)
            read = stream.read(_WINDOW)
            if not read:
                return
            line = _BLANK_LINE.search(read) if blank else None
            behind = line.end() if line else read.find(b"\n") + 1
            if behind:
                yield place + behind
            place = ((place + behind) // size + 1) * size


def _first_beyond(ends: Iterable[int], size: int) -> list[int]:
    """Of ascending places the first ones from each multiple of `size` on."""
    bounds, following = [], size
    for end in ends:
        if end >= following:
            bounds.append(end)
            following = (end // size + 1) * size
    return bounds


def _length(file: Path, known: int) -> int:
    """Bytes of a file, decompressed; at least `known`."""
    if not is_compressed(file):
        return file.stat().st_size
    with opened(file) as stream:
        stream.seek(known)
        while read := stream.read(_WINDOW):
            known += len(read)
        return known


def _row_groups(file: Path, column: str, size: int) -> list[Piece]:
    pieces, first, held = [], 0, 0
    sizes = row_group_sizes(file, column)
    for group, weight in enumerate(sizes, 1):
        held += weight
        if held >= size or group == len(sizes):
            pieces.append(Piece(file, first, group, held))
            first, held = group, 0
    return pieces
