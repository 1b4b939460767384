"""What tests/pretrain/test_processes.py has several processes do: runs one after another, in one group of processes.

Each process is started with the folder of the runs as its argument; `runs.json` in it names them.
"""

import json
import sys
from pathlib import Path

from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.processes import joined
from fastbert.pretrain.settings import PretrainConfig


def settings_of(folder, run):
    """A run's settings; its corpus and folder are in `folder`."""
    return PretrainConfig(
        output=folder / run["name"], corpus=folder / "manual.txt", vocab_size=1000, seq_len=32, batch_tokens=512,
        steps=12, lr=3e-3, held_out=0.1, evaluations=2, evaluation_batches=5, snapshot_every=4, keep=3, log_every=1,
        linear="torch", **{"accumulate": 3} | run["settings"],
    )  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined():
        for run in json.loads((folder / "runs.json").read_text()):
            pretrain(settings_of(folder, run), resume=run.get("resume", False))
