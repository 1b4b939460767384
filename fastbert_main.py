"""Where the console script `fastbert` begins: what must be in the environment before torch is loaded, then the program.

It lies outside the package because importing the package loads torch, and with it OpenMP's runtime, which reads once
how a thread waits for the others at the end of a parallel loop. By default a thread spins for milliseconds. On a
machine with a core for every thread that costs nothing; beside another busy process it spins through the time that the
thread it waits for would need, and a small model's step takes several times as long, on some machines over ten.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

# The OpenMP standard's variable, which every runtime reads; where it is libgomp, as in torch's wheels, its own wins.
# 2,000 turns are enough for threads that arrive together: a quiet machine loses 3 % of a small model's step by them, a
# sixth by sleeping at once; from 5,000 turns on little is gained on a busy one (benchmarks/neighbours.py).
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
INTELS = ("KMP_BLOCKTIME", "KMP_LIBRARY")  # Intel's runtime, in some builds of torch, has these besides


def set_waiting() -> bool:
    """Lets threads sleep that wait for others; for processes and libraries that are still to be started.

    Returns:
        Whether it changed the environment. False where one of the variables was set: then that holds.
    """
    if any(name in os.environ for name in (*WAITING, *INTELS)):
        return False
    os.environ.update(WAITING)
    return True


def without_torch() -> None:
    """Makes `fastbert` and `fastbert.data` packages whose `__init__` is not run, as it loads torch.

    Their modules are imported as ever; those that turn text into numbers need no torch, and without it a process takes
    a third of the memory and starts at once.
    """
    folder = Path(importlib.util.find_spec("fastbert").origin).parent
    for name, its in (("fastbert", folder), ("fastbert.data", folder / "data")):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(its)]
        package.__file__ = str(its / "__init__.py")
    sys.modules["fastbert"].data = sys.modules["fastbert.data"]


def write_shards() -> None:
    """A process of `fastbert prepare` that writes the shards whose numbers it reads, a line each."""
    without_torch()
    from fastbert.data.workers import serve

    serve(Path(sys.argv[1]), sys.stdin, sys.stdout)


def main() -> None:
    """The console script. What already stops the import, such as no torch, is a sentence too."""
    set_waiting()
    try:
        if sys.argv[1:2] == ["prepare"]:
            without_torch()
        from fastbert import cli
    except (ImportError, ValueError) as error:
        if os.environ.get("FASTBERT_DEBUG"):
            raise
        sys.exit(f"fastbert: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
