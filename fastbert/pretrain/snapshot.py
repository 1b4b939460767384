"""The state of a training run on disk: written whole or not at all, checked before it is trusted.

A snapshot is a folder `step-00001000` with `state.pt` (what `torch.save` writes) and `manifest.json` (its size and
SHA-256). A kill or a full disk at any time leaves the snapshots before it as they were (`files.whole_folder`).
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert import files


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `state` as the snapshot of `step` and removes all but the newest `keep` snapshots.

    Args:
        folder: holds the snapshots; made if missing.
        state: tensors, numbers, strings, lists and dicts, as `torch.load(weights_only=True)` takes them.
        keep: at least 1.

    Raises:
        OSError: it could not be written, for instance because the disk is full; older snapshots are untouched.
    """
    target = _path(folder, step)
    before = steps(folder)
    rest = f"the snapshot of step {before[-1]} is good" if before else "there is no earlier snapshot"
    with files.naming(target, f"the snapshot of step {step} was not written; {rest}: go on with --resume"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if target.exists() and _problem(target) is None:
            return target  # a run that was stopped here before: the same state
        with files.whole_folder(target) as writing:
            _write_state(state, writing / "state.pt")
            size, digest = _digest(writing / "state.pt")
            manifest = {"step": step, "bytes": size, "sha256": digest}
            (writing / "manifest.json").write_text(files.json_text(manifest))
    for old in steps(folder)[:-keep]:
        shutil.rmtree(_path(folder, old))
    return target


def load(folder: Path, names: Iterable[str] = ()) -> dict[str, Any] | None:
    """The newest snapshot's state, or None where there is none.

    Args:
        folder: holds the snapshots.
        names: what the state must have.

    Raises:
        ValueError: the newest snapshot is damaged, lacks one of `names`, or holds numbers that are not finite; the
            message says how to go on from the one before.
    """
    remove_unfinished(folder)
    known = steps(folder)
    if not known:
        return None
    newest = _path(folder, known[-1])
    problem = _problem(newest)
    if problem is None:
        state = torch.load(newest / "state.pt", weights_only=True)
        missing, bad = [name for name in names if name not in state], not_finite(state)
        if not missing and bad is None:
            return state
        problem = f"it lacks {', '.join(missing)}: another version wrote it" if missing else f"{bad} is not finite"
    earlier = f"the snapshot of step {known[-2]}" if len(known) > 1 else "the start"
    raise ValueError(f"snapshot {newest} cannot be used: {problem}. Remove that folder to go on from {earlier}")


def steps(folder: Path) -> list[int]:
    """Steps that have a snapshot, ascending; only folders named exactly as `save` names them count."""
    if not folder.is_dir():
        return []
    numbers = (int(path.name[5:]) for path in folder.iterdir() if re.fullmatch("step-[0-9]{8,}", path.name))
    return sorted(step for step in numbers if _path(folder, step).is_dir())


def not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor or number within dicts and lists that holds NaN or an infinity; None where none."""
    if isinstance(state, Tensor):
        if not state.is_floating_point() or not state.numel():
            return None
        return (
            None if all(extreme.isfinite() for extreme in state.aminmax()) else name
        )  # NaN is both: one pass, no copy
    if isinstance(state, float):
        return None if math.isfinite(state) else name
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    for key, item in state.items() if isinstance(state, dict) else ():
        found = not_finite(item, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f".step-*{files.WRITING}"):
        shutil.rmtree(path, ignore_errors=True)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _write_state(state: dict[str, Any], path: Path) -> None:
    """As `torch.save(state, path)`, but raises the system's own error, which torch turns into a RuntimeError."""
    try:
        with path.open("wb") as file:  # torch keeps the error of a file of ours as the context of its own
            torch.save(state, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _problem(snapshot: Path) -> str | None:
    try:
        manifest = json.loads((snapshot / "manifest.json").read_text())
        expected, checksum = manifest["bytes"], manifest["sha256"]
        size, digest = _digest(snapshot / "state.pt")
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json does not hold size and checksum ({error!r})"
    if size != expected:
        return f"state.pt has {size} bytes, its manifest says {expected}"
    if digest != checksum:
        return "state.pt does not match the checksum in its manifest"
    return None


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return path.stat().st_size, digest.hexdigest()
