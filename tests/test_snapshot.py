import json
import shutil
import subprocess
import sys

import pytest
import torch

from fastbert import snapshot


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


@pytest.mark.parametrize("damage", ["truncated", "changed", "no state", "no manifest", "not a manifest"])
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
    elif damage == "not a manifest":
        (newest / "manifest.json").write_text("{")
    else:
        (newest / ("state.pt" if damage == "no state" else "manifest.json")).unlink()
    with pytest.raises(ValueError, match=r"step-00000010 is damaged: .* go on from the snapshot of step 5"):
        snapshot.load(tmp_path)
    shutil.rmtree(newest)
    assert snapshot.load(tmp_path)["step"] == 5


def test_what_a_kill_leaves_half_written_is_ignored_and_removed(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=2)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".writing-step-00000010")
    assert snapshot.load(tmp_path)["step"] == 5
    assert not (tmp_path / ".writing-step-00000010").exists()


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fastbert import snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writing beyond it fails as a full disk does
snapshot.save(Path(sys.argv[1]), 10, {"weights": torch.zeros(1_000_000)}, keep=1)
"""


def test_a_full_disk_leaves_the_snapshot_before(tmp_path):
    snapshot.save(tmp_path, 5, state(5), keep=1)
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "could not write the snapshot of step 10" in ended.stderr
    assert "The snapshot of step 5 is good; make room on the disk" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert snapshot.load(tmp_path)["step"] == 5


def test_manifest_says_what_is_there(tmp_path):
    folder = snapshot.save(tmp_path, 7, state(7), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["bytes"] == (folder / "state.pt").stat().st_size
