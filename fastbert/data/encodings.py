"""Files opened as UTF-8 text, and for those that are not, what they are and what to do about it."""

import codecs
import io
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from fastbert.data.compressed import open_part, opened

_HEAD = 512  # bytes looked at before anything is read
_CHUNK = 1 << 20
_SAMPLE = 1 << 15  # bytes on either side of the first bad one that an encoding is guessed from

# First bytes, what the file is, and a command that prints it as UTF-8; of two that begin alike the longer comes first.
_SIGNATURES = [
    (b"\xff\xfe\x00\x00", "UTF-32", "iconv -f UTF-32 -t UTF-8 {file}"),
    (b"\x00\x00\xfe\xff", "UTF-32", "iconv -f UTF-32 -t UTF-8 {file}"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {file}"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {file}"),
    (b"\x84\x31\x95\x33", "GB 18030", "iconv -f GB18030 -t UTF-8 {file}"),
    (b"\x1f\x8b", "compressed by gzip", "gzip -dc {file}"),
    (b"\xfd7zXZ\x00", "compressed by xz", "xz -dc {file}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -dc {file}"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -dc {file}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so {file}"),
    (b"%PDF-", "a PDF document", "pdftotext {file} -"),
    (b"{\\rtf", "an RTF document", "pandoc -f rtf -t plain {file}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", "antiword {file}"),
]
_TABLES = {
    b"PAR1\x15": "a Parquet table",
    b"ARROW1\x00": "an Arrow table",
    b"SQLite format 3\x00": "an SQLite database",
}


@contextmanager
def open_text(file: Path, newline: str | None = None, start: int = 0, end: int | None = None) -> Iterator[TextIO]:
    """Opens a UTF-8 file, with or without a byte order mark; `newline` as in `open`.

    Args:
        file: one that ends in .gz or .zst is decompressed.
        start, end: the bytes to read, counted in what is compressed; None for all to the end.

    Raises:
        ValueError: the first bytes are those of another encoding, of a compressed or a binary file, or what is read in
            the block is not UTF-8, or damaged. ImportError: .zst without the package that reads it.
    """
    with open_part(file, start, end) as part:
        if start == 0 and (problem := _other_kind(file, part.peek(_HEAD)[:_HEAD])):
            raise ValueError(problem)
        with io.TextIOWrapper(part, encoding="utf-8" if start else "utf-8-sig", newline=newline) as stream:
            try:
                yield stream
            except UnicodeDecodeError:
                raise ValueError(_not_utf8(file)) from None


def _other_kind(file: Path, head: bytes) -> str | None:
    for signature, name, command in _SIGNATURES:
        if head.startswith(signature):
            return _other(file, name, command)
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return _other(file, "compressed by bzip2", "bzip2 -dc {file}")
    if head.startswith(b"PK\x03\x04"):
        if head[30:38] == b"mimetype" or b"[Content_Types].xml" in head or b"_rels/.rels" in head:
            return _other(file, "an Office document or an e-book", "pandoc -t plain {file}")
        return _other(file, "a zip archive", "unzip -p {file}")
    if head[257:262] == b"ustar":
        return _other(file, "a tar archive", "tar -xOf {file}")
    for signature, name in _TABLES.items():
        if head.startswith(signature):
            return f"{file} is no UTF-8 text but {name}: write its column of text as JSON lines (.jsonl) or CSV"
    if head.startswith(b"version https://git-lfs"):
        return f"{file} is a pointer of Git LFS and not the file itself: fetch that with git lfs pull"
    if zeros := head.count(0):
        if zeros > len(head) // 4:  # Latin letters in two bytes, or in four
            little = head[1::2].count(0) > head[::2].count(0)
            name = f"UTF-{16 if zeros < len(head) * 5 // 8 else 32}{'LE' if little else 'BE'}"
            return _other(file, f"{name} without a byte order mark, it seems", f"iconv -f {name} -t UTF-8 {{file}}")
        return f"{file} is a binary file, it holds zero bytes: give plain text in UTF-8"
    return None


def _other(file: Path, name: str, command: str) -> str:
    return (
        f"{file} is no plain UTF-8 text but {name}: convert it, {command.format(file=_quoted(file))} > new.txt, and "
        "give the new file"
    )


class _BadByte(NamedTuple):
    line: int  # from 1
    place: int  # in the line, from 1
    byte: int
    cut_off: bool  # the file ends within a character
    after_utf8: bool  # what comes before has letters beyond ASCII, more of them than other encodings pass by chance
    around: bytes


def _not_utf8(file: Path) -> str:
    """Where a file stops being UTF-8, why that may be, and what to do.

    No encoding is named as a fact: `charset-normalizer`, where it is installed, guesses one from the bytes around the
    place, and the sentence says so.
    """
    bad = _find_bad_byte(file)
    where = f"{file} is not UTF-8: line {bad.line}, byte {bad.place} (0x{bad.byte:02x})"
    if bad.cut_off:
        return f"{where}, where the file ends in the middle of a character: it was cut off, fetch or write it again"
    if bad.after_utf8:
        return (
            f"{where}; before it there are letters that are UTF-8, so the file is damaged or of several encodings: "
            f"mend it there, or leave out what cannot be read, iconv -c -f UTF-8 -t UTF-8 {_quoted(file)} > new.txt"
        )
    encoding = _guess(bad.around)
    command = f"iconv -f {encoding or 'ENCODING'} -t UTF-8 {_quoted(file)} > new.txt"
    if encoding is None:
        return (
            f"{where}; convert it from the encoding it was written in, {command} (iconv -l lists the names; pip "
            "install charset-normalizer, and a guess is made here), and look at the result before you train on it"
        )
    return (
        f"{where}; charset-normalizer guesses that it is {encoding}. If that is right, convert it, {command}; it is a "
        "guess, so look at the result before you train on it"
    )


def _find_bad_byte(file: Path) -> _BadByte:
    # The text layer reads ahead, so its error's position is no place in the file: look again.
    line, line_start, offset, continuations, rest = 1, 0, 0, 0, b""
    with opened(file) as stream:
        while True:
            chunk = stream.read(_CHUNK)
            data = rest + chunk
            try:
                text, used = codecs.utf_8_decode(data, "strict", not chunk)
                start = None
            except UnicodeDecodeError as error:
                start = used = error.start
                text = data[:start].decode()
                cut_off = error.reason == "unexpected end of data"
            continuations += used - len(text)
            if newlines := data.count(b"\n", 0, used):
                line += newlines
                line_start = offset + data.rindex(b"\n", 0, used) + 1
            if start is not None:
                around = data[max(0, start - _SAMPLE) : start + _SAMPLE]
                after_utf8 = continuations > 32
                return _BadByte(line, offset + start - line_start + 1, data[start], cut_off, after_utf8, around)
            if not chunk:
                raise AssertionError(f"{file} changed while it was read")
            offset, rest = offset + used, data[used:]


def _guess(sample: bytes) -> str | None:
    try:
        from charset_normalizer import from_bytes
    except ModuleNotFoundError:
        return None
    best = from_bytes(sample).best()
    # iconv has the names of Python's codecs, written with hyphens.
    return codecs.lookup(best.encoding).name.replace("_", "-").upper() if best else None


def _quoted(file: Path) -> str:
    return shlex.quote(str(file))
