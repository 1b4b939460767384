"""The state of a training run on disk: written whole or not at all, checked before it is trusted.

A snapshot is a folder `step-00001000` with `state.pt` (what `torch.save` writes) and `manifest.json` (its size and
SHA-256). Where several processes train, the model and its optimizer are in its folder `shards/` instead (what
`torch.distributed.checkpoint` writes), and the manifest has the files in there too. Either is read by any number of
processes. A kill or a full disk at any time leaves the snapshots before it as they were (`files.whole_folder`).
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert import files
from fastbert.optim.shards import local
from fastbert.pretrain.processes import ALONE, Processes

SHARDS, SHARDED = "shards", ("model", "optimizer")  # their folder, and what is in it


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    processes: Processes = ALONE,
    write_shards: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `state` as the snapshot of `step` and removes all but the newest `keep` snapshots.

    Args:
        folder: holds the snapshots; made if missing.
        state: tensors, numbers, strings, lists and dicts, as `torch.load(weights_only=True)` takes them; the first
            process's is written.
        keep: at least 1.
        processes: which all call this.
        write_shards: writes what is not in `state` into a folder, in all processes; see `shards.save`.

    Raises:
        OSError: it could not be written, for instance because the disk is full; older snapshots are untouched.
    """
    target = _path(folder, step)
    before = processes.first(lambda: steps(folder))
    rest = f"the snapshot of step {before[-1]} is good" if before else "there is no earlier snapshot"
    with (
        files.naming(target, f"the snapshot of step {step} was not written; {rest}: go on with --resume"),
        contextlib.ExitStack() as writing,
    ):

        def begin() -> Path | None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
            if target.exists() and _problem(target) is None:
                return None  # a run that was stopped here before: the same state
            return writing.enter_context(files.whole_folder(target))

        new = processes.first(begin)
        if new is None:
            return target
        if write_shards is not None:
            write_shards(new / SHARDS)

        def finish() -> None:
            _write_state(state, new / "state.pt")
            size, digest = _digest(new / "state.pt")
            manifest = {"step": step, "bytes": size, "sha256": digest}
            if write_shards is not None:
                manifest[SHARDS] = {path.name: _digest(path) for path in (new / SHARDS).iterdir()}
            (new / "manifest.json").write_text(files.json_text(manifest))
            writing.close()

        processes.first(finish)
    if processes.is_first:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(_path(folder, old))
    return target


def load(folder: Path, names: Iterable[str] = (), processes: Processes = ALONE) -> dict[str, Any] | None:
    """The newest snapshot's state, or None where there is none.

    Args:
        folder: holds the snapshots.
        names: what the state must have.
        processes: which all call this.

    Returns:
        What was saved; where it has shards, their folder as "shards".

    Raises:
        ValueError: the newest snapshot is damaged, lacks one of `names`, or holds numbers that are not finite; the
            message says how to go on from the one before.
    """

    def newest() -> Path | None:
        remove_unfinished(folder)
        known = steps(folder)
        if known and (problem := _problem(_path(folder, known[-1]))) is not None:
            raise unusable(folder, problem)
        return _path(folder, known[-1]) if known else None

    found = processes.first(newest)
    if found is None:
        return None
    state = torch.load(found / "state.pt", weights_only=True)
    if (found / SHARDS).exists():
        state[SHARDS] = found / SHARDS
        names = [name for name in names if name not in SHARDED]
    missing, bad = [name for name in names if name not in state], not_finite(state)
    if missing:
        raise unusable(folder, f"it lacks {', '.join(missing)}: another version wrote it")
    if bad is not None:
        raise unusable(folder, f"{bad} is not finite")
    return state


def unusable(folder: Path, problem: str) -> ValueError:
    """The newest snapshot has this problem."""
    *earlier, newest = steps(folder)
    before = f"the snapshot of step {earlier[-1]}" if earlier else "the start"
    newest = _path(folder, newest)
    return ValueError(f"snapshot {newest} cannot be used: {problem}. Remove that folder to go on from {before}")


def steps(folder: Path) -> list[int]:
    """Steps that have a snapshot, ascending; only folders named exactly as `save` names them count."""
    if not folder.is_dir():
        return []
    numbers = (int(path.name[5:]) for path in folder.iterdir() if re.fullmatch("step-[0-9]{8,}", path.name))
    return sorted(step for step in numbers if _path(folder, step).is_dir())


def not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor or number within dicts and lists that holds NaN or an infinity; None where none."""
    if isinstance(state, Tensor):
        state = local(state)
        if not state.is_floating_point() or not state.numel():
            return None
        are_finite = all(extreme.isfinite() for extreme in state.aminmax())  # NaN is both: one pass, no copy
        return None if are_finite else name
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
        expected = {"state.pt": (manifest["bytes"], manifest["sha256"])}
        expected |= {f"{SHARDS}/{name}": (size, digest) for name, (size, digest) in manifest.get(SHARDS, {}).items()}
        found = {name: _digest(snapshot / name) for name in expected}
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json does not hold size and checksum ({error!r})"
    for name, (size, digest) in expected.items():
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, its manifest says {size}"
        if found[name][1] != digest:
            return f"{name} does not match the checksum in its manifest"
    return None


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return path.stat().st_size, digest.hexdigest()
