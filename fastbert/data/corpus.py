"""Documents out of text files, folders and tables, one at a time."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

TEXTS = (".text", ".txt")
TABLES = (".csv", ".tsv")

# A text file without blank lines is handed out in documents of about this many characters, a longer line in parts.
MAX_CHARACTERS = 65_536
# A cell beyond this is no text but an unclosed quote that swallows the rest of a large file.
MAX_CELL = 1 << 26

_LINE_END = re.compile(r"\n|<br\s*/?>", re.IGNORECASE)
# Latin: terminators, closing quotes, a space and the next sentence's first character. CJK: no space is needed.
_SENTENCE_END = re.compile(r"""([.!?]+)["'”’»)\]]*(?=\s+(\S))|[。！？｡]+["'”’」』）》】)]*""")
_ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "rev",
        "gen",
        "col",
        "sgt",
        "lt",
        "capt",
        "sen",
        "rep",
        "gov",
        "vs",
        "cf",
        "fig",
    ]
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, e.g, U.S


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`, stripped, none empty.

    A sentence ends at a line end, at an HTML `<br>`, after `.`, `!` or `?` (and closing quotes) followed by a space and
    anything but a lower-case letter, after a terminator that stands alone between spaces (text that was tokenised
    before), and after `。`, `！` or `？`. None ends at the full stop of a common abbreviation or of initials (`Mr.`,
    `e.g.`, `J.`).
    """
    sentences = []
    for line in _LINE_END.split(text):
        start = 0
        for match in _SENTENCE_END.finditer(line):
            if match[1] and not _is_end(line, start, match):
                continue
            sentences.append(line[start : match.end()].strip())
            start = match.end()
        if rest := line[start:].strip():
            sentences.append(rest)
    return sentences


def _is_end(line: str, start: int, match: re.Match) -> bool:
    stop, following, at = match[1], match[2], match.start()
    if len(stop) == 1 and line[at - 1 : at].isspace():
        return True
    if following.islower():
        return False
    if stop != ".":
        return True
    words = line[max(start, at - 16) : at].split()
    word = words[-1].lstrip("\"'“‘«([") if words else ""
    return word == "I" or not (word.lower() in _ABBREVIATIONS or _INITIALS.fullmatch(word))


def iter_documents(path: str | Path, column: str | None = None) -> Iterator[list[str]]:
    """Documents of a corpus, each a non-empty list of sentences, in a fixed order and in bounded memory.

    - A text file, any suffix: blank lines separate documents and a line holds one or more sentences, the convention of
      BERT's own pretraining data. A stretch of more than 65,536 characters without a blank line is several documents.
    - A CSV or TSV file (`.csv`, `.tsv`, with a header line and Excel's quoting): with `column`, each row is a document.
    - A folder: its `.txt` and `.text` files, with `column` its `.csv` and `.tsv` files, recursively, sorted by path.

    Args:
        path: UTF-8 file (a byte order mark is skipped) or folder.
        column: name of the text column of a table; None for plain text.

    Raises:
        FileNotFoundError: no such path, or a folder without such files. Raised by the call, not by the first `next`.
        ValueError: a table without `column`, `column` with a text file (by the call); a column that does not exist, a
            row that ends before it, text that is not UTF-8, a corpus without any sentence (while iterating).
    """
    path = Path(path)
    if path.is_dir():
        suffixes = TEXTS if column is None else TABLES
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        if not files:
            hint = f"; for a column of tables ({', '.join(TABLES)}) name the column" if column is None else ""
            raise FileNotFoundError(f"the folder {path} holds no {' or '.join(suffixes)} files{hint}")
    elif path.is_file():
        table = path.suffix.lower() in TABLES
        if table and column is None:
            raise ValueError(f"{path} is a table: say which column holds the text, one of {_header(path)}")
        if not table and column is not None:
            raise ValueError(
                f"{path} is read as plain text, which has no column {column!r}: drop the column, or rename a table to "
                f"{' or '.join(TABLES)}"
            )
        files = [path]
    else:
        raise FileNotFoundError(f"the corpus {path} does not exist: give a text file, a folder or a CSV file")
    return _documents(path, files, column)


def _documents(path: Path, files: list[Path], column: str | None) -> Iterator[list[str]]:
    empty = True
    for file in files:
        try:
            with _open(file) as stream:
                for document in _text_documents(stream) if column is None else _table_documents(file, stream, column):
                    empty = False
                    yield document
        except UnicodeDecodeError:
            raise ValueError(_not_utf8(file)) from None
    if empty:
        raise ValueError(f"the corpus {path} holds no text: expected at least one sentence in {len(files)} file(s)")


def _open(file: Path) -> TextIO:
    # The csv module wants line ends untouched, so that those inside quotes survive.
    return open(file, encoding="utf-8-sig", newline="" if file.suffix.lower() in TABLES else None)


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


def _table_documents(file: Path, stream: TextIO, column: str) -> Iterator[list[str]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))  # the default, 131,072, is less than one long article
    rows = _reader(file, stream)
    try:
        header = next(rows, [])
        if column not in header:
            raise ValueError(f"{file} has no column {column!r}: expected one of {header}")
        place = header.index(column)
        for row in rows:
            if row and len(row) <= place:
                raise ValueError(
                    f"{file}, line {rows.line_num}: the row has {len(row)} cells, {column!r} is column {place + 1}: "
                    "quote cells that hold line ends or separators"
                )
            if row and (sentences := split_sentences(row[place])):
                yield sentences
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {rows.line_num}: {error}: look for a quote that is not closed or not doubled"
        ) from None


def _reader(file: Path, stream: TextIO) -> Iterator[list[str]]:
    # Strict: an unclosed quote is an error instead of one cell with the rest of the file.
    return csv.reader(stream, "excel-tab" if file.suffix.lower() == ".tsv" else "excel", strict=True)


def _header(file: Path) -> list[str]:
    with _open(file) as stream:
        return next(_reader(file, stream), [])


def _not_utf8(file: Path) -> str:
    # The decoder reads ahead, so the error's own position is no place in the file: look again, line by line.
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"line {number}, byte {error.start + 1} (0x{line[error.start]:02x})"
                return f"{file} is not UTF-8: {where}; convert it, e.g. iconv -f ISO-8859-1 -t UTF-8 {file} > new.txt"
    raise AssertionError(f"{file} changed while it was read")
