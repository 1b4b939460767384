"""Columns of a table: CSV, TSV, JSON lines and Parquet, read row by row.

A row that does not hold is an error that names all of its kind in the file, so a large table is mended in one go.
"""

import codecs
import csv
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from fastbert import extras
from fastbert.data.compressed import kind, opened
from fastbert.data.encodings import open_text

Quoting = Literal["auto", "double", "backslash", "none"]

SEPARATED = {".csv": ",", ".tsv": "\t"}  # suffix -> separator
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TABLES = (*SEPARATED, *JSON_LINES, PARQUET)

# A cell beyond this is no text but an unclosed quote that swallows the rest of a large file.
MAX_CELL = 1 << 26
_LINES_NAMED = 5

_QUOTING: dict[str, dict[str, Any]] = {
    "double": {"doublequote": True},
    "backslash": {"doublequote": False, "escapechar": "\\"},
    "none": {"quoting": csv.QUOTE_NONE},
}


def open_table(file: Path, start: int = 0, end: int | None = None) -> AbstractContextManager[TextIO]:
    """As `open_text`, line ends untouched, so that those inside quotes survive."""
    return open_text(file, "", start, end)


def is_json(file: Path, separator: str | None) -> bool:
    """Whether a table is read as JSON lines; a separator makes any file one of columns."""
    return kind(file) in JSON_LINES or (kind(file) == ".json" and separator is None)


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() == PARQUET


def column_texts(
    file: Path,
    stream: TextIO,
    column: str,
    separator: str | None = None,
    quoting: Quoting = "auto",
    start: int = 0,
) -> Iterator[str]:
    """The texts of a table's column, empty cells left out.

    Args:
        file: decides by its suffix how it is read: `.jsonl`, `.ndjson` and `.json` hold one JSON object a line,
            everything else is a header and rows of as many cells.
        stream: the file, opened by `open_table`.
        column: name of the column in the header, or of the objects' field.
        separator: one character; None: a tab for `.tsv`, else a comma. JSON has none.
        quoting: "double": a cell in double quotes may hold separators and line ends, and quotes written twice, as
            spreadsheets write it; "backslash": there quotes are written as \\"; "none": a quote is a character like
            others, a line is a row. "auto": "none" between tabs where the header has no quotes, else "double".
        start: the byte of the file at which the stream begins, which must be a row's first.

    Raises:
        ValueError: no such column; a row with another number of cells than the header (empty ones at its end are no
            harm); a quote that is not closed, or that swallows whole rows; a line that is no JSON object with a string
            in the field. All rows are looked at first, and the message counts them.
    """
    rows = table_rows(file, stream, [column], (), separator, quoting, start)
    return (row.cells[0] for row in rows if row.cells[0])


class Row(NamedTuple):
    """The line where a row begins, from 1, and the cells asked for or what is wrong with it."""

    line: int
    cells: tuple[str, ...] = ()
    problem: str | None = None


def table_rows(
    file: Path,
    stream: TextIO,
    columns: Sequence[str],
    labels: Sequence[str] = (),
    separator: str | None = None,
    quoting: Quoting = "auto",
    start: int = 0,
) -> Iterator[Row]:
    """A table's rows that are not blank, with the cells of these columns in this order; arguments as in `column_texts`.

    Args:
        columns: of text, at least one.
        labels: further columns, in which a JSON object may have numbers, true or false, read as JSON writes them.

    Raises:
        ValueError: as `column_texts`.
    """
    if is_json(file, separator):
        return _checked(file, _json_rows(stream, file, columns, labels), start)
    header = header_lines(file, separator, quoting) if start else []
    rows = _separated_rows(file, chain(header, stream), [*columns, *labels], separator, quoting)
    return _checked(file, rows, start, len(header))


def header_lines(file: Path, separator: str | None, quoting: Quoting) -> list[str]:
    """The lines of a table's header, as they stand in the file."""
    lines: list[str] = []
    with open_table(file) as stream:
        next(_reader(file, (lines.append(line) or line for line in stream), separator, quoting), None)
    return lines


def may_quote(file: Path, separator: str | None, quoting: Quoting) -> bool:
    """Whether a cell of a table may hold line ends, so that where a row ends depends on what stands before it."""
    if is_json(file, separator):
        return False
    with open_table(file) as stream:
        return _quoting(file, stream.readline(), separator, quoting) != "none"


def row_ends(file: Path, separator: str | None, quoting: Quoting) -> Iterator[int]:
    """The byte behind each row of a table of columns, until one that does not hold, which reading it will name."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    place = 0

    def counted(stream: TextIO) -> Iterator[str]:
        nonlocal place
        for line in stream:
            place += len(line) if line.isascii() else len(line.encode())
            yield line

    with opened(file) as stream:
        place += 3 if stream.read(3) == codecs.BOM_UTF8 else 0
    try:
        with open_table(file) as stream:
            for _ in _reader(file, counted(stream), separator, quoting):
                yield place
    except csv.Error:
        return


def column_names(file: Path, separator: str | None = None, quoting: Quoting = "auto") -> list[str]:
    """The names of a table's columns: its header's, or the fields of its first JSON object."""
    if is_parquet(file):
        with _parquet(file) as table:
            return table.schema_arrow.names
    with open_table(file) as stream:
        if not is_json(file, separator):
            return next(_reader(file, stream, separator, quoting), [])
        try:
            return list(dict(json.loads(stream.readline())))
        except (ValueError, TypeError):
            return []


def _checked(file: Path, rows: Iterator[Row], start: int = 0, header: int = 0) -> Iterator[Row]:
    """The rows, and an error that names those that do not hold; their lines are counted from the file's first.

    Args:
        start: the byte at which the rows begin. header: how many lines of the table's header were put before them.
    """
    bad: list[Row] = []
    more = 0
    for row in rows:
        if row.problem and len(bad) < _LINES_NAMED:
            bad.append(row)
        elif row.problem:
            more += 1
        elif not bad:
            yield row
    if bad:
        before = _lines_before(file, start) - header
        others = [f"{before + row.line:,}" for row in bad[1:]] + ([f"{more:,} more"] if more else [])
        also = f" (there is something wrong with other rows too, in lines {', '.join(others)})" if others else ""
        raise ValueError(f"{file}, line {before + bad[0].line:,}: {bad[0].problem}{also}")


def _lines_before(file: Path, place: int) -> int:
    lines = 0
    with opened(file) as stream:
        while place and (read := stream.read(min(place, 1 << 20))):
            lines += read.count(b"\n")
            place -= len(read)
    return lines


# ---- columns between separators --------------------------------------------------------------------------------------


def _separated_rows(
    file: Path, lines: Iterable[str], columns: Sequence[str], separator: str | None, quoting: Quoting
) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))  # the default, 131,072, is less than one long article
    rows = _reader(file, lines, separator, quoting)
    line = 1
    try:
        header = next(rows, [])
        places = [_place(file, header, column) for column in columns]
        line = rows.line_num + 1
        for row in rows:
            if any(map(str.strip, row)):  # not a blank line, nor one of separators alone
                if len(row) < len(header) or any(map(str.strip, row[len(header) :])):
                    yield Row(line, problem=_wrong_number(row, header))
                elif _swallows(row[: len(header)], places[0], rows.dialect.delimiter):
                    yield Row(line, problem=_SWALLOWED)
                else:
                    yield Row(line, tuple(row[place] for place in places))
            line = rows.line_num + 1
    except csv.Error as error:
        yield Row(
            line,
            problem=f"{error}: look for a quote that is not closed or not doubled; where quotes are written with a "
            "backslash pass --quoting backslash, where they are characters like others --quoting none",
        )


def _reader(file: Path, lines: Iterable[str], separator: str | None, quoting: Quoting) -> Any:
    lines = iter(lines)
    first = next(lines, "")
    # Strict: an unclosed quote is an error instead of one cell with the rest of the file.
    quoted = _QUOTING[_quoting(file, first, separator, quoting)]
    return csv.reader(chain([first], lines), delimiter=_separator(file, separator), strict=True, **quoted)


def _separator(file: Path, separator: str | None) -> str:
    return _one_character(separator) or SEPARATED.get(kind(file), ",")


def _quoting(file: Path, first: str, separator: str | None, quoting: Quoting) -> str:
    """How a table's cells are quoted, whose first line is given."""
    if quoting not in ("auto", *_QUOTING):
        raise ValueError(f"quoting is one of auto, {', '.join(_QUOTING)}: got {quoting!r}")
    if quoting != "auto":
        return quoting
    separator = _separator(file, separator)
    plain = separator == "\t" and not any(cell.startswith('"') for cell in first.split(separator))
    return "none" if plain else "double"


def _one_character(separator: str | None) -> str | None:
    if separator in ("\\t", "tab"):  # what a shell passes on
        return "\t"
    if separator is not None and (len(separator) != 1 or separator in '"\\\r\n'):
        raise ValueError(
            f"a separator is one character, such as ';' or '|', or \\t for a tab, and no quote, backslash or line end: "
            f"got {separator!r}"
        )
    return separator


def _place(file: Path, header: list[str], column: str) -> int:
    if (times := header.count(column)) == 1:
        return header.index(column)
    if not header:
        raise ValueError(f"{file} is empty: expected a header with the column {column!r}, and rows below it")
    if times:
        raise ValueError(f"{file} has {times} columns {column!r}: rename the others in its header")
    hint = "; where another character stands between the columns, name it (--separator)" if len(header) == 1 else ""
    raise ValueError(f"{file} has no column {column!r}: expected one of {header}{hint}")


def _wrong_number(row: list[str], header: list[str]) -> str:
    return (
        f"the row has {_cells(len(row))}, its header {len(header)}: put cells that hold the separator or a line end in "
        "quotes, or say how the file is written (--separator, --quoting)"
    )


def _cells(n: int) -> str:
    return f"{n} cell{'s' * (n != 1)}"


_SWALLOWED = (
    "the lines of a quoted cell are whole rows by themselves, so its quote seems to be a character of the text: double "
    "it and quote the cell, or pass --quoting none; where the cell is right, write the table as JSON lines (.jsonl)"
)


def _swallows(row: list[str], place: int, separator: str) -> bool:
    """Whether a row of several lines is as many rows, joined by a stray quote: each line has the right cells."""
    if len(row) == 1 or not any("\n" in cell or "\r" in cell for cell in row):
        return False
    # Cells by themselves tell: \r\n gives an empty line between two.
    lines = [line for line in separator.join(row).replace("\r", "\n").split("\n") if line.strip()]
    cells = [line.split(separator) for line in lines]
    if len(lines) < 2 or any(len(each) != len(row) for each in cells):
        return False
    # Prose has commas too, but then what stands beside the text has spaces, which numbers and labels have not.
    return separator == "\t" or not any(" " in cell for each in cells for cell in each[:place] + each[place + 1 :])


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def _json_rows(stream: TextIO, file: Path, columns: Sequence[str], labels: Sequence[str]) -> Iterator[Row]:
    names = *columns, *labels
    for number, line in enumerate(iter(lambda: stream.readline(MAX_CELL), ""), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, problem=f"not JSON ({error}): expected one object a line{_one_document(file, line)}")
            if number == 1:
                return  # the file as a whole is something else
            continue
        if not isinstance(record, dict):
            field = f"a field {columns[0]!r}"
            problem = f"expected a JSON object with {field}, got {_shown(line)}{_one_document(file, line)}"
            yield Row(number, problem=problem)
        elif problems := [*filter(None, (_problem(record, name, name in labels) for name in names))]:
            yield Row(number, problem=problems[0])
        else:
            values = (record[name] for name in names)
            yield Row(number, tuple(x if isinstance(x, str) else "" if x is None else json.dumps(x) for x in values))


def _problem(record: dict[str, Any], field: str, is_label: bool) -> str | None:
    """What is wrong with a field of a JSON object; None where nothing is."""
    if field not in record:
        return f"no field {field!r}: expected one of {list(record)}"
    value = record[field]
    if isinstance(value, str):
        if value.isascii() or _encodable(value):
            return None
        return f"the field {field!r} has half a character, \\ud800 to \\udfff: mend its escape"
    if value is None or (is_label and isinstance(value, int | float)):
        return None
    kinds = "a string, a number or null" if is_label else "a string or null"
    return f"the field {field!r} must be {kinds}, got {_shown(json.dumps(value))}"


def _one_document(file: Path, line: str) -> str:
    if not line.lstrip().startswith(("[", "{")):
        return ""
    return f"; a file that is a single JSON array is taken apart by jq -c '.[]' {shlex.quote(str(file))} > new.jsonl"


def _shown(text: str) -> str:
    return text.strip() if len(text) < 60 else f"{text.strip()[:50]}..."


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- Parquet ---------------------------------------------------------------------------------------------------------

_PARQUET_ROWS = 64  # read at a time; a row group is not held in memory as a whole


def parquet_texts(file: Path, column: str, first: int = 0, end: int | None = None) -> Iterator[str]:
    """The texts of a column in row groups `first` to `end`, empty cells left out.

    Raises:
        ValueError: no such column, one that is not of strings, a file that is damaged. ImportError: pyarrow is missing.
    """
    with _parquet(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{file} has no column {column!r}: expected one of {names}")
        held = table.schema_arrow.field(column).type
        if str(getattr(held, "value_type", held)) not in ("string", "large_string", "string_view", "null"):
            raise ValueError(f"the column {column!r} of {file} must hold strings, and is of type {held}")
        groups = range(first, table.num_row_groups if end is None else end)
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[column], use_threads=False):
            yield from filter(None, batch.column(0).to_pylist())


def row_group_sizes(file: Path, column: str) -> list[int]:
    """Bytes of a column in each row group of a Parquet file, uncompressed."""
    with _parquet(file) as table:
        place = table.schema_arrow.names.index(column) if column in table.schema_arrow.names else 0
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        return [group.column(min(place, group.num_columns - 1)).total_uncompressed_size for group in groups]


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    if why := extras.missing(f"reading {file} needs", "pyarrow"):
        raise ImportError(why)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            yield table
    except ArrowException as error:
        raise ValueError(f"{file} is no Parquet file, or is damaged ({error}): fetch or write it again") from error
