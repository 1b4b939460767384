"""How several processes of a run end: killed, out of memory, diverged, by a signal; and what is kept then."""

import random
import signal
import time

import pytest
import together
from pretrain_runs import assert_same_run, losses, places, start

from fastbert.pretrain import snapshot

pytestmark = pytest.mark.nested

HAPPENS = """
import os, signal, sys
import torch
from fastbert.cli import main
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain import shards
see, save = Watch.see, shards.save

def happen(what):
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        raise MemoryError("a test says so")

def see_and_more(self, step, loss, norm):
    if step == {step} and os.environ["RANK"] == "{rank}":
        happen("{what}")
    see(self, step, loss * torch.nan if "{what}" == "nan" and step == {step} else loss, norm)

def save_and_more(model, optimizer, folder):
    save(model, optimizer, folder)
    if "step-{step:08d}" in folder.parent.name and os.environ["RANK"] == "{rank}" and "{what}" == "killed in writing":
        happen("killed")

Watch.see, shards.save = see_and_more, save_and_more
main()
"""


def run(config, *extra, what="", step=0, rank=0, count=2):
    """What the processes printed, and their exit status."""
    code = HAPPENS.format(what=what, step=step, rank=rank)
    processes = [start(config, *extra, code=code, environment=place) for place in places(count)]
    return end(processes), [process.returncode for process in processes]


def end(processes):
    """What they printed, when all have ended; none outlives this."""
    try:
        return [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("ends")
    (folder / "manual.txt").write_text(corpus.read_text()[:60_000])
    return lambda name: together.settings_of(folder, {"name": name, "settings": {"steps": 24, "keep": 2}})


def test_killed_five_times_they_end_in_the_same_bits(settings):
    """Either of them, at random in a step, and in writing a snapshot."""
    whole, config, draw = settings("whole"), settings("killed"), random.Random(3)
    assert run(whole)[1] == [0, 0]
    for attempt in range(5):
        rank, step = draw.randrange(2), 4 * attempt + draw.randrange(2, 6)
        what = "killed"
        if attempt == 2:
            step, what = 12, "killed in writing"
        said, status = run(config, *(["--resume"] if attempt else []), what=what, step=step, rank=rank)
        assert status[rank] == -signal.SIGKILL and status[1 - rank] == 1, said
        assert "cannot reach the others any more, one of which has ended: go on with --resume" in said[1 - rank]
        assert "Traceback" not in said[1 - rank]
    assert snapshot.steps(config.output / "snapshots")[-1] >= 15
    said, status = run(config, "--resume")
    assert status == [0, 0], said
    assert_same_run(config.output, whole.output)
    assert not list((config.output / "snapshots").glob(".*"))


@pytest.mark.parametrize("what", ["memory", "nan"])
def test_what_one_meets_ends_all_with_one_message(settings, what):
    config = settings(what)
    said, status = run(config, what=what, step=5, rank=1)
    assert status == [1, 1], said
    message = {"memory": "not enough memory; a smaller --batch-tokens", "nan": "the run diverged at step 5 of 24"}[what]
    assert sum(message in each for each in said) == 1, said
    assert snapshot.steps(config.output / "snapshots") == [3]


def test_a_signal_to_one_stops_all_after_the_same_step(settings):
    config = settings("stopped")
    processes = [start(config, environment=place) for place in places(2)]
    while processes[0].poll() is None and max(losses(config.output), default=0) < 4:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes)
    assert [process.returncode for process in processes] == [130, 130], said
    step = snapshot.steps(config.output / "snapshots")[-1]
    assert f"stopped by a signal to another process after step {step} of 24" in said[0]
