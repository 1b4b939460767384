"""Runs that are killed or stopped end in the bits of an unbroken one, and leave no process behind."""

import dataclasses
import os
import random
import signal
import time

import pytest
from pretrain_runs import assert_same_run, losses, start

from fastbert.pretrain import snapshot
from fastbert.pretrain.loop import pretrain

INSIDE_WRITING = """
import os, signal, sys, torch
from fastbert.cli import main
save, count = torch.save, 0

def save_half(state, file):
    global count
    count += 1
    if count == 2:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)

torch.save = save_half
main()
"""


def test_killed_twice_it_ends_in_the_same_bits(settings, finished, tmp_path):
    config = dataclasses.replace(settings, output=tmp_path / "killed", workers=1)  # outlives a kill for a moment
    for attempt in range(2):  # in training, then while a snapshot is written
        process = start(
            config, *(["--resume"] if attempt else []),
            **({"code": INSIDE_WRITING} if attempt == 1 else {}),
        )  # fmt: skip
        if attempt == 0:
            until = random.Random(1).randrange(1, 20)
            while process.poll() is None and max(losses(config.output), default=0) < until:
                time.sleep(0.002)
            process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    pretrain(config, resume=True)
    assert_same_run(config.output, finished)
    assert not list((config.output / "snapshots").glob(".*"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where there is one core
def test_signals_to_the_process_group_save_and_end_cleanly(settings, finished, tmp_path):
    """What a terminal, systemd, SLURM and containers send reaches the workers too."""
    config = dataclasses.replace(settings, output=tmp_path / "stopped", snapshot_every=1000, workers=2)
    step = 0
    for number, resumed in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
        process = start(config, *resumed)
        while process.poll() is None and max(losses(config.output), default=0) < step + 5:
            time.sleep(0.002)
        os.killpg(process.pid, number)
        output = process.communicate()[0]
        assert process.returncode == 130, output
        before, step = step, snapshot.steps(config.output / "snapshots")[-1]
        assert f"stopped by {number.name} after step {step} of 40; go on with: fastbert pretrain --output" in output
        assert "Traceback" not in output and step > before
    pretrain(config, resume=True)
    assert_same_run(config.output, finished)


def test_workers_end_with_a_killed_parent(settings, tmp_path):
    config = dataclasses.replace(settings, output=tmp_path / "killed", steps=100_000, workers=2)
    process = start(config)
    while process.poll() is None and not losses(config.output):
        time.sleep(0.002)
    process.kill()
    process.wait()
    ended = time.monotonic() + 3  # by itself a worker of torch looks for its parent every five seconds
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < ended:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    process.stdout.close()
