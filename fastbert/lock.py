"""One process at a time in a folder: of a run, of a token store."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from fastbert import files

_held: set[int] = set()  # descriptors of this process's locks


def _drop_in_child() -> None:
    """A worker shares its parent's lock and would hold it for as long as it outlives a killed parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


@contextlib.contextmanager
def hold(
    folder: Path, does: str = "trains there", stopped: str = "Ctrl-C or SIGTERM takes a snapshot"
) -> Iterator[None]:
    """Keeps other processes, and other calls in this one, out of `folder` for the block.

    The system drops the lock with the process, however it ends, so none is ever stale; the file `.lock`, which says who
    holds it, stays. Where a file system has no locks, that is said and the block runs without one.

    Args:
        folder: made where it does not exist; then the block that fails before anything else is in it leaves nothing of
            it, nor of the folders above that were made for it.
        does, stopped: what the message says of the process that holds it, and of one that is stopped.

    Raises:
        BlockingIOError: somebody holds it; the message says which process, where and since when.
        OSError: the folder cannot be made, or the lock's file not be written.
    """
    path = folder / ".lock"
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{folder} is in use: {_holder(path)} {does}. Wait until it ends or stop it ({stopped}), or choose "
                "another --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{folder} is on a file system without locks ({error.strerror}): start no second process there")
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = {"process": os.getpid(), "host": platform.node(), "since": since}
        with files.naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, files.json_text(holder).encode(), 0)
        try:
            yield
        except BaseException:
            if descriptor in _held:
                _remove_unused(path, new)
            raise
    finally:
        if descriptor in _held:  # not in a worker, where the number may be another file by now
            _held.remove(descriptor)
            os.close(descriptor)


def _remove_unused(path: Path, new: list[Path]) -> None:
    """Removes the lock's file and the `new` folders around it, innermost first, where nothing else is in them."""
    with contextlib.suppress(OSError):
        if new and [each.name for each in new[0].iterdir()] == [path.name]:
            path.unlink()
            for folder in new:
                folder.rmdir()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it has not said so yet
        return "another process"
