"""Runs of a tiny pretraining: as processes of their own, compared, and what the program says when it refuses."""

import dataclasses
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastbert import cli
from fastbert.pretrain.report import read_metrics


def start(config, *extra, code="from fastbert.cli import main; main()", environment=()):
    """The run as a process of its own, so that it can be killed; `environment` are variables beside this process's."""
    arguments = ["pretrain", *extra]
    for name, value in dataclasses.asdict(config).items():
        if "--resume" not in extra and isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif value is not None and (name == "output" or "--resume" not in extra):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | threads | dict(environment), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def places(count):
    """For each of several processes of one run, what torchrun puts into its environment; one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    same = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def assert_same_run(folder, finished):
    """Bit for bit: losses of every step, held-out scores, and the exported weights."""
    assert losses(folder) == losses(finished)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (folder, finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def bad(capsys, monkeypatch, *arguments):
    """What the program says when it refuses; it must not be a traceback."""
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return str(ended.value)
