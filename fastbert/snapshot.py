"""The state of a training run on disk: written whole or not at all, checked before it is trusted.

A snapshot is a folder `step-00001000` with `state.pt` (what `torch.save` writes) and `manifest.json` (its size and
SHA-256). It is written under a hidden name, flushed to the disk and renamed, so that a kill or a full disk at any time
leaves the snapshots before it as they were.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastbert import files

_WRITING = ".writing-"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `state` as the snapshot of `step` and removes all but the newest `keep` snapshots.

    Args:
        folder: holds the snapshots; made if missing.
        state: tensors, numbers, strings, lists and dicts, as `torch.load(weights_only=True)` takes them.
        keep: at least 1.

    Raises:
        OSError: it could not be written, for instance because the disk is full; older snapshots are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    writing = folder / f"{_WRITING}{target.name}"
    remove_unfinished(folder)
    if target.exists() and _problem(target) is None:
        return target  # a run that was stopped here before: the same state
    writing.mkdir()
    try:
        torch.save(state, writing / "state.pt")
        size, digest = _digest(writing / "state.pt")
        (writing / "manifest.json").write_text(json.dumps({"step": step, "bytes": size, "sha256": digest}))
        for path in (writing / "state.pt", writing / "manifest.json", writing):
            files.flush(path)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        files.flush(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(writing, ignore_errors=True)
        before = steps(folder)
        rest = f"The snapshot of step {before[-1]} is good" if before else "There is no earlier snapshot"
        raise OSError(
            f"could not write the snapshot of step {step} to {folder}: {error}. {rest}; make room on the disk and go "
            "on with --resume"
        ) from error
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")
    return target


def load(folder: Path) -> dict[str, Any] | None:
    """The newest snapshot's state, or None where there is none.

    Raises:
        ValueError: the newest snapshot is damaged; the message says how to go on from the one before.
    """
    remove_unfinished(folder)
    known = steps(folder)
    if not known:
        return None
    newest = folder / f"step-{known[-1]:08d}"
    problem = _problem(newest)
    if problem:
        earlier = f"the snapshot of step {known[-2]}" if len(known) > 1 else "the start"
        raise ValueError(f"snapshot {newest} is damaged: {problem}. Remove that folder to go on from {earlier}")
    return torch.load(newest / "state.pt", weights_only=True)


def steps(folder: Path) -> list[int]:
    """Steps that have a snapshot, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*")) if folder.is_dir() else []


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _problem(snapshot: Path) -> str | None:
    try:
        manifest = json.loads((snapshot / "manifest.json").read_text())
        size, digest = _digest(snapshot / "state.pt")
    except (OSError, ValueError) as error:
        return str(error)
    if size != manifest["bytes"]:
        return f"state.pt has {size} bytes, its manifest says {manifest['bytes']}"
    if digest != manifest["sha256"]:
        return "state.pt does not match the checksum in its manifest"
    return None


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return path.stat().st_size, digest.hexdigest()
