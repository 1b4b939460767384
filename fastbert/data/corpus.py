"""Documents out of text files, folders and tables, one at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from fastbert.data.compressed import is_compressed
from fastbert.data.encodings import open_text
from fastbert.data.sentences import split_sentences
from fastbert.data.sources import CorpusFiles, find_files
from fastbert.data.tables import Quoting, column_texts, is_parquet, open_table, parquet_texts

# A text file without blank lines is handed out in documents of about this many characters, a longer line in parts.
MAX_CHARACTERS = 65_536


class Reading(NamedTuple):
    """How the files of a corpus are read; see `iter_documents`."""

    column: str | None = None
    separator: str | None = None
    quoting: Quoting = "auto"


class Piece(NamedTuple):
    """A part of a file that holds whole documents.

    Attributes:
        start, end: its bytes, counted where the file is decompressed; of Parquet its row groups. None: to the end.
        weight: its size in bytes, of Parquet that of the column.
    """

    file: Path
    start: int = 0
    end: int | None = None
    weight: int = 0


def iter_documents(
    path: str | Path,
    column: str | None = None,
    *,
    separator: str | None = None,
    quoting: Quoting = "auto",
    progress: str | None = None,
) -> Iterator[list[str]]:
    """Documents of a corpus, each a non-empty list of sentences, in a fixed order and in bounded memory.

    - A text file, any suffix: blank lines separate documents and a line holds one or more sentences, the convention of
      BERT's own pretraining data. A stretch of more than 65,536 characters without a blank line is several documents.
    - A table, with `column`: every row is a document. `.csv` and `.tsv` files have a header line, `.jsonl` and
      `.ndjson` files one JSON object a line; with `separator` a file of any suffix is a table. `.parquet` files are
      read by pyarrow, in batches of rows.
    - A text or a table whose name ends in `.gz` or `.zst` besides is decompressed.
    - A folder: its `.txt` and `.text` files, with `column` its tables, recursively, sorted by path; `find_files` says
      what is left out.

    Args:
        path: UTF-8 file (a byte order mark is skipped) or folder.
        column: name of the table's column, or of the JSON objects' field, that holds the text; None for plain text.
        separator, quoting: how a table's cells are told apart, see `column_texts`.
        progress: label of a bar that shows how many of the files' bytes have been read; None for no bar.

    Raises:
        FileNotFoundError: no such path, or a folder without such files. Raised by the call, not by the first `next`.
        ValueError: a table without `column`, `column` with a text file (by the call); a column that does not exist,
            rows that do not hold, text that is not UTF-8, a corpus without any sentence (while iterating).
    """
    files = find_files(path, column, separator).read
    return _some(path, files, _documents(files, Reading(column, separator, quoting), progress))


def check_corpus(
    path: str | Path, column: str | None = None, *, separator: str | None = None, quoting: Quoting = "auto"
) -> CorpusFiles:
    """Looks at the beginning of every file of a corpus, before hours are spent on the first ones.

    Returns:
        The files that `iter_documents` reads with the same arguments, and what it leaves out.

    Raises:
        FileNotFoundError, ValueError: as `iter_documents`, for what the first document of each file shows.
    """
    files = find_files(path, column, separator)
    first = [next(_documents([file], Reading(column, separator, quoting), None), None) for file in files.read]
    next(_some(path, files.read, filter(None, first)))
    return files


def _some(path: str | Path, files: list[Path], documents: Iterator[list[str]]) -> Iterator[list[str]]:
    first = next(documents, None)
    if first is None:
        raise ValueError(f"the corpus {path} holds no text: expected at least one sentence in {len(files)} file(s)")
    yield first
    yield from documents


def _documents(files: list[Path], reading: Reading, progress: str | None) -> Iterator[list[str]]:
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, desc=progress, unit="B", unit_scale=True, disable=progress is None) as bar:
        for file in files:
            before, held = bar.n, file.stat().st_size

            def read(place: int, before: int = before, held: int = held) -> None:
                bar.update(before + min(place, held) - bar.n)

            by_bytes = not (is_compressed(file) or is_parquet(file))
            yield from piece_documents(Piece(file), reading, read if by_bytes else None)
            bar.update(before + held - bar.n)


def piece_documents(
    piece: Piece, reading: Reading, progress: Callable[[int], None] | None = None
) -> Iterator[list[str]]:
    """The documents of a part of a file, as `iter_documents` gives those of files.

    Args:
        progress: is told, behind every document, how many bytes of the piece were read; not of Parquet.
    """
    if is_parquet(piece.file):
        yield from filter(None, map(split_sentences, parquet_texts(piece.file, reading.column, *piece[1:3])))
        return
    start, end = piece.start, piece.end
    opened = open_text(piece.file, None, start, end) if reading.column is None else open_table(piece.file, start, end)
    with opened as stream:
        if reading.column is None:
            documents = _text_documents(stream)
        else:
            documents = filter(None, map(split_sentences, column_texts(piece.file, stream, *reading, start)))
        for document in documents:
            yield document
            if progress is not None:
                progress(stream.buffer.tell())


def _text_documents(stream: TextIO) -> Iterator[list[str]]:
    document: list[str] = []
    size = 0
    for line in _lines(stream):
        sentences = split_sentences(line)
        if document and (not sentences or size >= MAX_CHARACTERS):
            yield document
            document, size = [], 0
        document += sentences
        size += len(line)
    if document:
        yield document


def _lines(stream: TextIO) -> Iterator[str]:
    rest = ""
    while line := stream.readline(MAX_CHARACTERS):
        text, rest = rest + line, ""
        if len(line) == MAX_CHARACTERS and not line.endswith("\n"):
            cut = text.rfind(" ") + 1 or len(text)
            text, rest = text[:cut], text[cut:]
        yield text
    if rest:
        yield rest
