"""The program `fastbert`: its commands, each a function, and how they end."""

import argparse
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert import extras, files
from fastbert.version import __version__

USAGE = """usage: fastbert COMMAND

  info        what runs here: every op by every backend, versions, instruction set, threads
  prepare     raw text, however much, to a folder of tokens that pretrain --store reads at once
  pretrain    raw text to a BERT, ALBERT, RoBERTa or ERNIE that transformers loads, or an ELMo; see its --help
  finetune    a table of texts with classes or numbers, and any such model, to a classifier; its score, a picture
  distill     a classifier's folder to a small model that does as it does: TextCNN, BiLSTM or fewer layers; with
              --corpus a pretrained model's folder to a small one of its kind
  predict     a classifier's labels for new texts
  embed       vectors of texts or of their tokens by any such model, to .npy or .safetensors
  fill        the likeliest words for the [MASK]s of a text by any such model
  attention   who looks at whom in a sentence, by layer and head, as a page for the browser and a PNG
  bench       the ops and a training step, verified and timed beside torch's and others', as a table and a page
  --version   the version of this package"""

TRAININGS = "pretrain", "finetune", "distill"


def main() -> None:
    """Runs one command; an error it understands ends in a sentence, the traceback shown with FASTBERT_DEBUG=1."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    try:
        try:
            run(command, arguments)
        finally:
            sys.stdout.flush()  # not when Python ends, where a closed pipe would be a traceback
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        trained = command in TRAININGS and {"-h", "--help"}.isdisjoint(arguments)
        sys.exit(f"fastbert {command}: {error}" if trained else 128 + signal.SIGPIPE)  # `head` has read enough
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FASTBERT_DEBUG"):
            raise
        sys.exit(f"fastbert {command}: {error}")
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("FASTBERT_DEBUG") or not _is_about_memory(error):
            raise
        less = {
            "finetune": "a smaller --batch-size or --seq-len",
            "distill": "a smaller --batch-size (with --corpus --batch-tokens) or --seq-len",
            "prepare": "fewer --workers",
            "pretrain": "a smaller --batch-tokens (with --accumulate), --checkpoint-layers or a smaller --preset",
        }.get(command, "a smaller --batch-tokens")
        sys.exit(f"fastbert {command}: not enough memory; {less} takes less: {error}")
    except KeyboardInterrupt:
        print(f"fastbert {command}: interrupted", file=sys.stderr)
        sys.exit(130)


def run(command: str, arguments: list[str]) -> None:
    """The command itself; raises SystemExit unless its status is 0 and there is nothing more to say."""
    if command == "info" and not arguments:
        from fastbert.backends import info, linear

        print(info(), linear.info(), waiting(), sep="\n")
    elif command in COMMANDS:
        COMMANDS[command](arguments)
    elif command in TRAININGS:
        sys.exit({"pretrain": pretrain, "finetune": finetune, "distill": distill}[command](arguments))
    elif command in ("-h", "--help") or arguments in (["-h"], ["--help"]):
        print(USAGE)
    elif command == "--version":
        print(f"fastbert {__version__}")
    elif command == "info":
        sys.exit(f"fastbert info takes no arguments, got {' '.join(arguments)}")
    else:
        sys.exit(f"fastbert: there is no command {command!r}\n{USAGE}")


def _is_about_memory(error: MemoryError | RuntimeError) -> bool:
    """torch raises a plain RuntimeError where the CPU's memory is used up, and where a GPU's libraries find no more."""
    import torch  # here, as not every command needs it

    said = "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def waiting() -> str:
    """How OpenMP's threads wait for each other in this process, and what that costs; lines for `fastbert info`.

    What counts is what stood in the environment when torch was loaded; see `fastbert_main`.
    """
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"
    given = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return (
        f"threads wait by  {given or 'spinning, for none of ' + ', '.join(names) + ' is set'}\n"
        "                 Beside a busy process spinning makes a small model's step several times as slow. Where\n"
        "                 none is set, fastbert's commands set OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000, which\n"
        "                 costs a few percent on a quiet machine; for other programs, set them before Python starts."
    )


def pretrain(arguments: list[str]) -> int:
    """`fastbert pretrain`; the exit status: 0 when the run ended, 130 when Ctrl-C or SIGTERM stopped it."""
    _expect_packages("pretraining needs", "tensorboard", "matplotlib")  # these two at the end only
    import tyro

    from fastbert.pretrain import presets
    from fastbert.pretrain import pretrain as train
    from fastbert.pretrain.run import read_config
    from fastbert.pretrain.settings import PretrainConfig

    @dataclasses.dataclass(frozen=True)
    class Command(PretrainConfig):
        """Pretrain a BERT, ALBERT, RoBERTa, ERNIE or ELMo on raw text; everything goes into the folder --output."""

        resume: bool = False
        """Continue the run in --output from its newest snapshot, with the settings it was started with."""

    def parse(**default: Command) -> Command:
        try:
            return tyro.cli(Command, args=arguments, prog="fastbert pretrain", **default)
        except SystemExit as ended:
            if not ended.code:  # --help
                print(presets.table(Command.vocab_size, Command.batch_tokens, Command.seq_len))
            raise

    command = parse()
    if command.resume:
        stored = Command(**dataclasses.asdict(read_config(command.output)), resume=True)
        check_unchanged(stored, parse(default=stored))
    settings = {field.name: getattr(command, field.name) for field in dataclasses.fields(PretrainConfig)}
    return 0 if train(PretrainConfig(**settings), resume=command.resume) else 130


def prepare(arguments: list[str]) -> None:
    """`fastbert prepare`."""
    _expect_packages("preparing needs")
    from fastbert.prepare import PrepareConfig
    from fastbert.prepare import prepare as run_prepare

    too_many = "a store is made of one file or folder; put the files into a folder, or add the other one by --add"
    run_prepare(_parse(PrepareConfig, "prepare", PrepareConfig.__doc__, arguments, too_many))


def finetune(arguments: list[str]) -> int:
    """`fastbert finetune`; the exit status: 0 when the run ended, 130 when Ctrl-C or SIGTERM stopped it."""
    _expect_packages("fine-tuning needs", "sklearn", "scipy", "matplotlib")
    from fastbert.finetune import FinetuneConfig
    from fastbert.finetune import finetune as train

    return _train(train, FinetuneConfig, "Train a classifier of texts, or a regression, over a model.", arguments)


def distill(arguments: list[str]) -> int:
    """`fastbert distill`; the exit status as of `finetune`."""
    if _is_general(arguments):
        _expect_packages("distilling on a corpus needs", "sklearn", "scipy", "matplotlib", "tensorboard")
        from fastbert.distill import GeneralConfig, distill_general

        described = "Train a small model to have the inside of a pretrained one, before it has a task (TinyBERT)."
        return _train(distill_general, GeneralConfig, described, arguments)
    _expect_packages("distilling needs", "sklearn", "scipy", "matplotlib")
    from fastbert.distill import DistillConfig
    from fastbert.distill import distill as train

    described = (
        "Train a small model to do as a trained classifier does. With --corpus it learns from a pretrained model in "
        "place of that, before it has a task; what that takes says fastbert distill --corpus TEXT --help."
    )
    return _train(train, DistillConfig, described, arguments)


def _is_general(arguments: list[str]) -> bool:
    """Whether a distillation is one on a corpus: it names one, or the run that it goes on with does."""
    if any(each.split("=")[0] == "--corpus" for each in arguments):
        return True
    folder = _folder_to_resume(arguments)
    return folder is not None and "corpus" in (files.json_object_or_none(folder / "config.json") or {})


def _train(train: Callable[..., Path | None], kind: type, description: str, arguments: list[str]) -> int:
    """A training that can be resumed; its settings are the dataclass `kind`."""
    import tyro

    from fastbert.finetune.run import read_config

    @dataclasses.dataclass(frozen=True)
    class Command(kind):
        resume: bool = False
        """Continue the run in --output from its newest snapshot, with the settings it was started with."""

    def parse(**default: Command) -> Command:
        program = f"fastbert {kind.command}"
        return tyro.cli(Command, args=arguments, prog=program, description=description, **default)

    folder = _folder_to_resume(arguments)
    if folder is None:
        command = parse()
    else:
        stored = Command(**dataclasses.asdict(read_config(folder, kind)), resume=True)
        command = parse(default=stored)
        check_unchanged(stored, command)
    settings = {field.name: getattr(command, field.name) for field in dataclasses.fields(kind)}
    return 0 if train(kind(**settings), resume=command.resume) else 130


def _folder_to_resume(arguments: list[str]) -> Path | None:
    """What --output says beside --resume; None without either, or where help is asked for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        given, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # tyro says it better
        return None
    return given.output if given.resume and {"-h", "--help"}.isdisjoint(others) else None


def predict(arguments: list[str]) -> None:
    """`fastbert predict`."""
    _expect_packages("predicting needs", "sklearn", "scipy", "matplotlib")
    from fastbert.finetune import PredictConfig
    from fastbert.finetune import predict as run_predict

    run_predict(_parse(PredictConfig, "predict", "Predict the labels of texts by a classifier.", arguments))


def embed(arguments: list[str]) -> None:
    """`fastbert embed`."""
    _expect_packages("embedding needs")
    from fastbert.embed import EmbedConfig
    from fastbert.embed import embed as run_embed

    run_embed(_parse(EmbedConfig, "embed", "Write the vectors of texts, or of their tokens, by a model.", arguments))


def fill(arguments: list[str]) -> None:
    """`fastbert fill`."""
    _expect_packages("filling gaps needs")
    from fastbert.fill import FillConfig
    from fastbert.fill import fill as run_fill

    run_fill(_parse(FillConfig, "fill", "Show the likeliest words for the [MASK]s of texts by a model.", arguments))


def attention(arguments: list[str]) -> None:
    """`fastbert attention`."""
    _expect_packages("showing attention needs", "matplotlib")
    from fastbert.attention_page import AttentionConfig
    from fastbert.attention_page import attention as run_attention

    run_attention(_parse(AttentionConfig, "attention", "Show the attention of a sentence in a model.", arguments))


def bench(arguments: list[str]) -> None:
    """`fastbert bench`."""
    _expect_packages("measuring needs")
    from fastbert.bench.run import bench as run_bench
    from fastbert.bench.settings import BenchConfig

    described = "Verify the ops and a training step, and time them beside torch's and what else is installed."
    run_bench(_parse(BenchConfig, "bench", described, arguments))


def _expect_packages(what: str, *more: str) -> None:
    if why := extras.missing(what, "numpy", "tokenizers", "safetensors", "tyro", "tqdm", *more):
        raise ImportError(why)


def _parse(settings: type, command: str, description: str, arguments: list[str], too_many: str = "leave it out") -> Any:
    """The settings that the arguments say; `too_many` is what to do about a path or word that no setting takes."""
    import tyro

    parse = functools.partial(tyro.cli, settings, args=arguments, prog=f"fastbert {command}", description=description)
    config, others = parse(return_unknown_args=True)
    if any(each.startswith("-") for each in others):
        parse()  # says which option may have been meant, and ends
    if others:
        raise ValueError(f"{others[0]!r} is one argument too many: {too_many}; --help says what is taken")
    return config


def check_unchanged(stored: Any, given: Any) -> None:
    """Raises ValueError where a resumed run is given other settings than it has."""
    now = dataclasses.asdict(given)
    changed = {name: value for name, value in dataclasses.asdict(stored).items() if value != now[name]}
    if changed:
        raise ValueError(
            "a resumed run keeps its settings; "
            + ", ".join(f"{name} was {was}, now {now[name]}" for name, was in changed.items())
            + ": leave them out, or start a new run in another --output"
        )


COMMANDS = {
    "prepare": prepare, "predict": predict, "embed": embed, "fill": fill, "attention": attention, "bench": bench,
}  # fmt: skip
