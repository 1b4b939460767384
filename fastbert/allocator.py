"""Keeps freed memory in the process.

glibc gives large blocks back to the system when they are freed and takes them anew, page by page, at every training
step; on a CPU that costs a training step a quarter of its time. Importing the package changes nothing: a program that
wants this calls `keep_memory()` before its first large tensor, as `fastbert pretrain` does.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_state = "as the process was started (fastbert.keep_memory() was not called)"


def keep_memory() -> bool:
    """Asks the allocator to keep freed blocks of up to 1 GiB for the next step; for the whole process.

    The same as starting it with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647.

    Returns:
        Whether both settings took effect. False without glibc, and where an older glibc refuses them.
    """
    global _state
    if platform.libc_ver()[0] != "glibc":
        _state = "unchanged: keep_memory() needs glibc"
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) == 1 and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) == 1
    _state = "keeps freed memory (keep_memory)" if kept else "unchanged: this glibc refused the thresholds"
    return kept


def state() -> str:
    """One line for `fastbert info` and run logs: what `keep_memory` did in this process."""
    return _state
