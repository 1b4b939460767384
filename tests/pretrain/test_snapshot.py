import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert.pretrain import snapshot


def state(step, size=1000):
    return {"step": step, "weights": torch.arange(size, dtype=torch.float32), "name": "x"}


def test_round_trip_and_keep(tmp_path):
    assert snapshot.load(tmp_path / "none") is None
    for step in (5, 10, 15):
        snapshot.save(tmp_path, step, state(step), keep=2)
    assert snapshot.steps(tmp_path) == [10, 15]
    loaded = snapshot.load(tmp_path)
    assert loaded["step"] == 15 and torch.equal(loaded["weights"], torch.arange(1000.0))


def test_saving_a_step_twice_is_no_second_write(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    before = (tmp_path / "step-00000005/state.pt").stat().st_ino
    snapshot.save(tmp_path, 5, state(5), keep=2)
    assert (tmp_path / "step-00000005/state.pt").stat().st_ino == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "no state", "no manifest", "{", "{}", "[]", '{"bytes": 1}'])
def test_a_damaged_snapshot_is_named(tmp_path, damage):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    newest = snapshot.save(tmp_path, 10, state(10), keep=2)
    file = newest / "state.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage[0] in "{[":
        (newest / "manifest.json").write_text(damage)
    else:
        (newest / ("state.pt" if damage == "no state" else "manifest.json")).unlink()
    with pytest.raises(ValueError, match=r"step-00000010 cannot be used: .* go on from the snapshot of step 5"):
        snapshot.load(tmp_path)
    shutil.rmtree(newest)
    assert snapshot.load(tmp_path)["step"] == 5


def test_what_a_kill_leaves_half_written_is_ignored_and_removed(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".step-00000010.writing")
    assert snapshot.load(tmp_path)["step"] == 5
    assert not (tmp_path / ".step-00000010.writing").exists()


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fastbert.pretrain import snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writing beyond it fails as a full disk does
snapshot.save(Path(sys.argv[1]), 10, {"weights": torch.zeros(1_000_000)}, keep=1)
"""


def test_a_full_disk_leaves_the_snapshot_before(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=1)
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "step-00000010" in ended.stderr and "the snapshot of step 10 was not written" in ended.stderr
    assert "files may not become that large here" in ended.stderr
    assert "the snapshot of step 5 is good: go on with --resume" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert snapshot.load(tmp_path)["step"] == 5


def test_only_the_system_blames_the_disk(tmp_path, monkeypatch):
    snapshot.save(tmp_path, 5, state(5), keep=1)
    with pytest.raises(OSError, match="No space left") as full:
        snapshot._write_state(state(10), Path("/dev/full"))
    assert full.value.errno == errno.ENOSPC

    def interrupted(state, file):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 7\) is killed by signal: Terminated\.$"):
        snapshot.save(tmp_path, 10, state(10), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_only_exact_names_are_snapshots(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    for name in (
        "step-00000040.bak",
        "step-abc",
        "step-40",
        "step-",
        "step-000000040",
        "step-\u0664" * 8,
        "x-00000050",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000060").touch()
    assert snapshot.steps(tmp_path) == [5] and snapshot.load(tmp_path)["step"] == 5
    snapshot.save(tmp_path, 123456789, state(123456789), keep=1)
    assert snapshot.steps(tmp_path) == [123456789]
    assert (tmp_path / "step-00000040.bak").is_dir() and not (tmp_path / "step-00000005").exists()


def test_a_state_that_is_not_finite_or_not_whole_is_refused(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    assert snapshot.load(tmp_path, ["step", "weights"])["step"] == 5
    with pytest.raises(ValueError, match=r"step-00000005 cannot be used: it lacks data, random: another version"):
        snapshot.load(tmp_path, ["step", "data", "random"])
    bad = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.tensor([1.0, torch.nan])}}}}
    snapshot.save(tmp_path, 10, state(10) | bad, keep=2)
    with pytest.raises(ValueError, match=r"optimizer\.state\.1\.exp_avg is not finite.*snapshot of step 5"):
        snapshot.load(tmp_path)
    assert (
        snapshot.not_finite({"lists": [{"lr": [0.1, float("inf")]}], "n": 3, "ids": torch.arange(3)}) == "lists.0.lr.1"
    )
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for value in (torch.nan, torch.inf, -torch.inf):
            assert snapshot.not_finite({"x": torch.tensor([1.0] * 99 + [value] + [2.0] * 9, dtype=dtype)}) == "x"
    assert snapshot.not_finite({"none": torch.empty(0), "one": torch.tensor(3.0)}) is None
    assert snapshot.not_finite({"random": torch.get_rng_state(), "betas": (0.9, 0.99), "name": "nan"}) is None


def test_manifest_says_what_is_there(tmp_path):
    folder = snapshot.save(tmp_path, 7, state(7), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["bytes"] == (folder / "state.pt").stat().st_size
