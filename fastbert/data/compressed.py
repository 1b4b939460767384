"""Bytes of files, plain or compressed by gzip or Zstandard: as a whole, and from one place to another."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastbert import extras

COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 17


def kind(file: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".jsonl" of a.jsonl and of a.JSONL.gz."""
    return Path(file.stem if is_compressed(file) else file).suffix.lower()


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; ValueError where they are damaged or cut off."""
    with _damage_named(file), _decompressed(file) as stream:
        yield stream


@contextmanager
def open_part(file: Path, start: int, end: int | None) -> Iterator[io.BufferedReader]:
    """Bytes `start` to `end` of a file, counted where it is decompressed; its `tell` counts from `start`.

    A compressed file stays open, so that the next part of it goes on where the last one ended instead of at the
    beginning of the file.
    """
    with _damage_named(file):
        if not is_compressed(file):
            with open(file, "rb") as stream, io.BufferedReader(_Part(stream, start, end), _CHUNK) as part:
                yield part
            return
        stream = _left_open.pop(file, None) or _decompressed(file)
        try:
            with io.BufferedReader(_Part(stream, start, end), _CHUNK) as part:
                yield part
        except BaseException:
            stream.close()
            raise
        for other in _left_open.values():
            other.close()
        _left_open.clear()
        if end is None:
            stream.close()
        else:
            _left_open[file] = stream


_left_open: dict[Path, BinaryIO] = {}  # at most one


class _Part(io.RawIOBase):
    def __init__(self, stream: BinaryIO, start: int, end: int | None):
        stream.seek(start)
        self.stream, self.place = stream, 0
        self.length = None if end is None else end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer) if self.length is None else min(len(buffer), self.length - self.place)
        data = self.stream.read(wanted)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def tell(self) -> int:
        return self.place


def _decompressed(file: Path) -> BinaryIO:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        if why := extras.missing(f"reading {file} needs", "zstandard"):
            raise ImportError(why)
        return io.BufferedReader(_Zstandard(file), _CHUNK)
    return open(file, "rb")


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file in a row. (The package's own stream ends quietly where the last frame was cut off.)"""

    def __init__(self, file: Path):
        import zstandard

        self.file, self.error = open(file, "rb"), zstandard.ZstdError  # noqa: SIM115 - closed below
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.data, self.place = memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.data:
            read = self.file.read(_CHUNK)
            if not read:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            self.data = memoryview(self._decompress(read))
        count = min(len(buffer), len(self.data))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        self.place += count
        return count

    def _decompress(self, read: bytes) -> bytes:
        pieces = []
        while read:
            if self.frame is None or self.frame.eof:
                self.frame = self.decompressor.decompressobj()
            try:
                pieces.append(self.frame.decompress(read))
            except self.error as error:
                raise EOFError(str(error)) from error
            read = self.frame.unused_data
        return b"".join(pieces)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """By reading on, where it goes back from the beginning."""
        target = offset if whence == io.SEEK_SET else self.place + offset
        if target < self.place:
            self.file.seek(0)
            self.frame, self.data, self.place = None, memoryview(b""), 0
        while self.place < target and self.read(min(_CHUNK, target - self.place)):
            pass
        return self.place

    def tell(self) -> int:
        return self.place

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged or was cut off ({error}): fetch or write it again") from error
