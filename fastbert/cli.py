"""The console script: `fastbert info` and `fastbert pretrain`."""

import dataclasses
import os
import sys

from fastbert import backend
from fastbert.ops import linear

USAGE = """usage: fastbert COMMAND

  info        what runs here: every op by every backend, versions, instruction set, threads
  pretrain    raw text to a BERT that transformers loads; see fastbert pretrain --help"""


def main() -> None:
    """Runs one command; an error it understands ends in a sentence, the traceback shown with FASTBERT_DEBUG=1."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    try:
        if command == "info":
            print(backend.info(), linear.info(), sep="\n")
        elif command == "pretrain":
            sys.exit(pretrain(arguments))
        elif command in ("-h", "--help"):
            print(USAGE)
        else:
            sys.exit(f"fastbert: there is no command {command!r}\n{USAGE}")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FASTBERT_DEBUG"):
            raise
        sys.exit(f"fastbert {command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"fastbert {command}: interrupted")


def pretrain(arguments: list[str]) -> int:
    """`fastbert pretrain`; the exit status: 0 when the run ended, 130 when Ctrl-C or SIGTERM stopped it."""
    try:
        import tyro

        from fastbert.pretrain import pretrain as run
        from fastbert.run import PretrainConfig, read_config
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; pretraining needs: pip install "fastbert-kernels[pretrain]"') from error

    @dataclasses.dataclass(frozen=True)
    class Command(PretrainConfig):
        """Pretrain a BERT on raw text; everything goes into the folder --output."""

        resume: bool = False
        """Continue the run in --output from its newest snapshot, with the settings it was started with."""

    command = tyro.cli(Command, args=arguments, prog="fastbert pretrain")
    if command.resume:
        stored = Command(**dataclasses.asdict(read_config(command.output)), resume=True)
        given = dataclasses.asdict(tyro.cli(Command, args=arguments, prog="fastbert pretrain", default=stored))
        changed = {name: value for name, value in given.items() if value != getattr(stored, name)}
        if changed:
            raise ValueError(
                "a resumed run keeps its settings; "
                + ", ".join(f"{name} was {getattr(stored, name)}, now {value}" for name, value in changed.items())
                + ": leave them out, or start a new run in another --output"
            )
    settings = {field.name: getattr(command, field.name) for field in dataclasses.fields(PretrainConfig)}
    return 0 if run(PretrainConfig(**settings), resume=command.resume) else 130
