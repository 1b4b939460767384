"""Signals that end a run: the training process takes a snapshot first, its workers leave that to it."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that Ctrl-C and SIGTERM put their name into, for the loop to see; a second one acts at once.

    In a thread other than the main one, which alone is given signals, they stay the program's own.
    """
    stopped: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: object) -> None:
        stopped.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_the_parent_alone(worker: int) -> None:
    """In a worker: signals to the whole process group, as SLURM and systemd send them, are the training process's."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the training process, however that ends
