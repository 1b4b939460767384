"""What tests/pretrain/test_processes.py has several processes do: runs one after another, in one group of processes.

Each process is started with two arguments: the folder of the runs, and the runs as JSON.
"""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from unittest import mock

from fastbert.pretrain import loop, meter
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.processes import joined
from fastbert.pretrain.settings import PretrainConfig


def settings_of(folder, run):
    """A run's settings; its corpus and folder are in `folder`."""
    usual = PretrainConfig(
        output=folder / run["name"], corpus=folder / "manual.txt", vocab_size=500, seq_len=32, batch_tokens=256,
        steps=12, lr=3e-3, held_out=0.1, evaluations=2, evaluation_batches=5, snapshot_every=3, keep=4, log_every=1,
        linear="torch", accumulate=3,
    )  # fmt: skip
    settings = dict(run.get("settings", {}))
    for name in {"init", "add_words"} & settings.keys():
        settings[name] = folder / settings[name]
    if "phases" in settings:
        settings["phases"] = tuple(settings["phases"])
    return dataclasses.replace(usual, **settings)


def broken_off(config, step):
    """The run, until an error before this step's optimizer, which all processes meet."""
    see = Watch.see

    def see_and_fail(self, number, *others):
        if number == step:
            raise OverflowError
        see(self, number, *others)

    with mock.patch.object(Watch, "see", see_and_fail), contextlib.suppress(OverflowError):
        pretrain(config)


@contextlib.contextmanager
def quick():
    """Runs draw no curve and measure the machine by a small product: both would take longer than twelve steps."""
    with (
        mock.patch.object(loop, "plot_loss", lambda records, path, title: path.touch()),
        mock.patch.object(meter, "SIDE", {"cpu": 64}),
    ):
        yield


def wait_for(path):
    ends = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < ends, f"{path} has not come"
        time.sleep(0.02)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined() as processes, quick():
        for run in json.loads(sys.argv[2]):
            config = settings_of(folder, run)
            if "broken_off" in run:
                broken_off(config, run["broken_off"])
                processes.first((folder / f"{run['name']} is there").touch)
                continue
            if "resume" in run:
                wait_for(folder / f"{run['name']} is there")
            pretrain(config, resume="resume" in run)
