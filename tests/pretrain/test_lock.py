import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest

from fastbert import lock

HOLDER = """
import os, sys, time
from pathlib import Path
from fastbert import lock
with lock.hold(Path(sys.argv[1])):
    worker = os.fork()  # as a DataLoader's, which outlives a parent that is killed
    if worker == 0:
        os.close(1)
        time.sleep(60)
    print(worker, flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_who_trains_and_a_kill_leaves_nothing_behind(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError) as refused, lock.hold(tmp_path):
            pass
        since = json.loads((tmp_path / ".lock").read_text())["since"]
        assert str(refused.value).startswith(
            f"{tmp_path} is in use: process {holder.pid} on {platform.node()}, since {since}, trains there."
        )
        holder.kill()
        holder.communicate()
        with lock.hold(tmp_path):
            os.kill(worker, 0)  # raises where it is gone: then it would have shown nothing
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_is_held_once_and_free_again(tmp_path):
    with lock.hold(tmp_path):
        (tmp_path / ".lock").write_text("")  # the holder has not said who it is
        with pytest.raises(BlockingIOError, match="in use: another process trains there"), lock.hold(tmp_path):
            pass
    with pytest.raises(KeyError), lock.hold(tmp_path):
        raise KeyError
    with lock.hold(tmp_path):
        pass


def test_a_block_that_fails_leaves_of_its_folders_what_was_there_or_was_written(tmp_path):
    for there, written, left in (
        ("", "", []),
        ("runs", "", ["runs"]),
        ("runs/new", "", ["runs", "runs/new", "runs/new/.lock"]),
        ("", "text", ["runs", "runs/new", "runs/new/.lock", "runs/new/text"]),
    ):
        (tmp_path / there).mkdir(parents=True, exist_ok=True)
        with pytest.raises(KeyError), lock.hold(tmp_path / "runs/new"):
            if written:
                (tmp_path / "runs/new" / written).touch()
            raise KeyError
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.hold(tmp_path):
        assert "without locks (No locks available): start no second process there" in capsys.readouterr().out
