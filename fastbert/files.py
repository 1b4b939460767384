"""Files and folders that are written whole or not at all: how this package writes what must survive a kill."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What to do about an error that the system reports; only these are about the disk.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "files may not become that large here: raise the limit (ulimit -f) or choose another folder",
    errno.EIO: "the disk failed: look at the system's log and choose another folder",
    errno.EROFS: "the disk cannot be written to: choose another folder",
    errno.EACCES: "choose another folder, or ask for the permission",
    errno.EPERM: "choose another folder, or ask for the permission",
}

WRITING = ".writing"  # ends the hidden name of what is not whole yet


def write(folder: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
    """Writes files into `folder`, which is made where it does not exist.

    Every file is first written under a hidden name and flushed to the disk; then all are moved into place in the order
    given. After a full disk or a kill each file is as it was or as it should be, and what was half-written is gone, or
    is hidden and replaced by the next try.

    Args:
        folder: where they go.
        contents: file name -> bytes; what a reader looks for first comes last.

    Raises:
        OSError: a file could not be written; the error names it and nothing is changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".{name}{WRITING}" for name in contents}
    try:
        for (path, temporary), data in zip(staged.items(), contents.values(), strict=True):
            with naming(path, "what was there before is unchanged"):
                temporary.write_bytes(data)
                flush(temporary)
        for path, temporary in staged.items():
            os.replace(temporary, path)
        flush(folder)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and is removed when it does not.

    It has a hidden name beside `path` and is flushed to the disk before it takes the place of what was there, so that
    after a full disk or a kill `path` is as it was or as it should be.
    """
    writing = path.with_name(f".{path.name}{WRITING}")
    shutil.rmtree(writing, ignore_errors=True)  # of a process that was killed
    writing.mkdir(parents=True)
    try:
        yield writing
        flush_all(writing)
        shutil.rmtree(path, ignore_errors=True)
        writing.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


@contextlib.contextmanager
def naming(path: str | os.PathLike, rest: str = "") -> Iterator[None]:
    """An OSError within the block is raised as one that names `path` and what to do, and ends with `rest`.

    The disk is blamed only where the system's own error number does.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        parts = [reason, _REMEDIES.get(error.errno, ""), rest]
        raise OSError(error.errno, "; ".join(part for part in parts if part), str(path)) from error


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, paths as strings; ValueError for NaN and the infinities, which JSON does not have."""
    return json.dumps(value, indent=indent, allow_nan=False, default=os.fspath)


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; ValueError where that is no object, OSError, naming it, where it cannot be read."""
    with naming(path):
        content = path.read_bytes()
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def json_object_or_none(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where it is missing or damaged."""
    try:
        return json_object(path)
    except (OSError, ValueError):
        return None


def flush(path: str | os.PathLike) -> None:
    """Waits until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Waits until a folder and all that is in it is on the disk."""
    for part in (*folder.rglob("*"), folder):
        flush(part)


def refuse_lfs_pointer(path: str | os.PathLike) -> None:
    """Raises ValueError where `path` is the small text that a clone without git-lfs has in place of a large file."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs install && git lfs pull` in its "
                "folder, or download the file"
            )
