"""The folder of a fine-tuning or distillation: its settings, and what must hold for it to be begun or gone on with."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from torch import Tensor

from fastbert import files, lock
from fastbert.data.texts import Encoded


class RunConfig(Protocol):
    """Settings of a training that can be resumed; see `TaskConfig` for its attributes."""

    command: ClassVar[str]
    sources: ClassVar[tuple[str, ...]]
    output: Path

    def check(self) -> None: ...


Config = TypeVar("Config", bound=RunConfig)


def refuse_many_processes() -> None:
    """Raises ValueError where torchrun or its like started this process as one of several."""
    world = os.environ.get("WORLD_SIZE", "")
    if world not in ("", "1"):
        raise ValueError(
            f"this training runs in one process, and WORLD_SIZE={world} says that this is one of several: start it "
            "once, without torchrun (on a CPU one process uses all cores; OMP_NUM_THREADS says how many)"
        )


def refuse_what_is_there(folder: Path) -> None:
    """Raises ValueError where a new run's folder exists."""
    if (folder / "config.json").exists() and not (folder / "scores.json").exists():
        raise ValueError(
            f"{folder} already holds a run (config.json): pass --resume to continue it, or choose another --output"
        )
    if folder.exists():
        raise ValueError(f"{folder} is there already, and it would be written over: choose another --output")


@contextlib.contextmanager
def begun(config: RunConfig, resume: bool) -> Iterator[None]:
    """Within the block the run's folder is this process's; a new run's is made, and its config.json makes it a run."""
    if not resume:
        config.output.mkdir(parents=True)
    with lock.hold(config.output):
        if not resume:
            files.write(config.output, {"config.json": settings_text(dataclasses.asdict(config))})
        yield


_ADDED_LATER = {"features": False}  # settings that runs did not have once, and what they did then


def read_config(folder: Path, kind: type[Config]) -> Config:
    """The settings of the run in `folder`, which has not ended, as `kind`.

    Raises:
        FileNotFoundError: there is no run. ValueError: it has ended, or its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no run to resume: there is no {path}. A run that ended before its first step is started "
            "again without --resume"
        )
    if (folder / "scores.json").exists():
        raise ValueError(
            f"the run in {folder} has ended, its model is {folder / 'model'}: to train longer, start a new run in "
            "another --output"
        )
    try:
        stored = files.json_object(path)
        names = {field.name for field in dataclasses.fields(kind)}
        stored = _ADDED_LATER | stored
        stored = {name: value for name, value in stored.items() if name in names} | {"output": folder}
        if missing := sorted(names - stored.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name in kind.sources:
            value = stored[name]
            if value is not None:
                stored[name] = Path(value) if isinstance(value, str) else tuple(map(Path, value))
        config = kind(**stored)
        config.check()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run of fastbert {kind.command}: {error}. Put it back, or "
            "start a new run in another --output"
        ) from error
    return config


def settings_text(content: dict) -> bytes:
    return (files.json_text(content, indent=2) + "\n").encode()


def fingerprint(encoded: Sequence[list[Encoded]], targets: Sequence[Tensor], classes: Sequence[str]) -> str:
    """Of all that the texts, their labels and the tokenizer contribute to a run; SHA-256."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for texts, labels in zip(encoded, targets, strict=True):
        for each in texts:
            digest.update(np.array([len(each.ids), *each.ids, *each.type_ids], dtype=np.int64).tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def resume_command(config: RunConfig) -> str:
    return f"fastbert {config.command} --output {config.output} --resume"
