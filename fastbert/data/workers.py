"""Processes that write the shards of a store: on this machine, or Dask's on a cluster.

On this machine each is a Python of its own that loads what it needs and no torch. It is told the number of a shard a
line, and answers by lines of JSON; when the process that started it ends, however that ends, it ends too.
"""

import gc
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fastbert import extras
from fastbert.signals import obey_the_parent_alone

_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, ImportError, OSError, MemoryError)}
# One core each; and free memory goes back to the system, which saves a third of it for a twentieth of the speed.
_ALONE = {
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 24),
}  # fmt: skip


def on_this_machine(
    store: Path, numbers: list[int], processes: int, progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """What `write_shard` returns of each shard, as they are done; raises what it raises."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        todo.put(number)
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running = [_start(store) for _ in range(min(processes, len(numbers)))]
    try:
        for process in running:
            threading.Thread(target=_talk, args=(process, todo, said), daemon=True).start()
        left = len(numbers)
        while left:
            answer = said.get()
            if isinstance(answer, BaseException):
                raise answer
            if "bytes" in answer:
                progress(answer["bytes"])
            else:
                left -= 1
                yield answer
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _start(store: Path) -> subprocess.Popen:
    program = "import fastbert_main; fastbert_main.write_shards()"
    environment = os.environ | _ALONE | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, store], env=environment, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _talk(process: subprocess.Popen, todo: queue.SimpleQueue, said: queue.SimpleQueue) -> None:
    """In a thread: hands shards to a process and its answers on."""
    try:
        while True:
            process.stdin.write(f"{todo.get_nowait()}\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                said.put(_error(answer) if "error" in answer else answer)
                if "bytes" not in answer:
                    break
            else:
                raise ChildProcessError(
                    f"a process that was writing a shard ended with status {process.wait()}, as one does that is "
                    "killed where memory is short: run the command once more, and it goes on with the shards that are "
                    "missing; --workers takes fewer at a time"
                )
    except queue.Empty:
        pass
    except Exception as error:  # such as a pipe that is closed; one that nobody heard of would be waited for forever
        said.put(error)


def _error(answer: dict[str, Any]) -> BaseException:
    kind = _ERRORS.get(answer["error"], RuntimeError)
    return kind(*answer["arguments"])


def serve(store: Path, asked: Iterable[str], answers: TextIO) -> None:
    """In a process of its own: writes the shards whose numbers it is told."""
    from fastbert.data.shard_writer import write_shard

    obey_the_parent_alone(0)
    gc.disable()  # lists of words by the million, none of which is part of a cycle, are not looked through

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    for line in asked:
        try:
            answer(**write_shard(store, int(line), lambda read: answer(bytes=read)))
            gc.collect()
        except tuple(_ERRORS.values()) as error:
            kind = next(kind for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
            answer(error=kind.__name__, arguments=[x if isinstance(x, int) else str(x) for x in _parts(error)])


def _parts(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, OSError) and error.errno is not None:
        parts = error.errno, error.strerror, error.filename
        return parts if error.filename is not None else parts[:2]
    return error.args


def on_cluster(
    address: str,
    write_shard: Callable[..., dict[str, Any]],
    store: Path,
    numbers: list[int],
    done: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """As `on_this_machine`, by the workers of a Dask scheduler, which gives a lost worker's shards to the others."""
    if why := extras.missing("working on a cluster needs", "distributed"):
        raise ImportError(why)
    from concurrent.futures import CancelledError

    from distributed import Client, KilledWorker, as_completed

    with Client(address) as client:
        futures = client.map(write_shard, [str(store)] * len(numbers), numbers, pure=False)
        for future in as_completed(futures):
            try:
                result = future.result()
            except (KilledWorker, CancelledError) as error:
                raise ChildProcessError(
                    f"the cluster gave up a shard ({error}), as it does after several workers died at it or where the "
                    "scheduler ended: run the command once more, and it goes on with the shards that are missing"
                ) from error
            done(result["number"])
            yield result
