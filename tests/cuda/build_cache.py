"""Files made by a compiler, kept in build/cuda as long as nothing that they are made of changes."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/cuda"


def included(source: Path) -> list[Path]:
    """The source, and what lines such as `#include "launch.h"` in it and in those files lead to, in whatever #if."""
    found, waiting = set(), [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s+"(.+?)"', path.read_text(), re.MULTILINE)
            waiting += [(path.parent / name).resolve() for name in names]
    return sorted(found)


def built(source: Path, command: list[str], suffix: str) -> Path:
    """What `command -o FILE` makes of a source; beside it, with the suffix `.log`, what the compiler said.

    It is made anew where the command, the compiler, the source or a header that it includes has changed. Two processes
    at once do no harm.
    """
    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    digest = hashlib.sha256("\0".join([*command, str(compiler), str(compiler.stat().st_mtime_ns)]).encode())
    for path in included(source):
        digest.update(path.read_bytes())
    target = CACHE / f"{source.stem}.{digest.hexdigest()[:20]}{suffix}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}{suffix}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    target.with_suffix(".log").write_text(done.stdout + done.stderr)
    unfinished.replace(target)
    return target
