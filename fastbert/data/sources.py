"""Which files a corpus is read from, and what in its folder is left out."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

from fastbert.data.compressed import COMPRESSED, kind
from fastbert.data.tables import PARQUET, TABLES, column_names, is_json, is_parquet

TEXTS = (".text", ".txt")

_KINDS_SAID = 6  # a folder of name.1, name.2, ... has as many suffixes as files


class CorpusFiles(NamedTuple):
    """The files of a corpus in the order in which they are read, and how many others were left out, by kind.

    `str` of it is a line for the screen.
    """

    read: list[Path]
    left_out: Counter[str]

    def __str__(self) -> str:
        said = f"read: {_counted(Counter(file.suffix.lower() or 'without suffix' for file in self.read))}"
        return f"{said}; left out: {_counted(self.left_out)}" if self.left_out else said


def find_files(
    path: str | Path, column: str | None = None, separator: str | None = None, option: str = "--column"
) -> CorpusFiles:
    """The files that `iter_documents` reads with these arguments.

    Of a folder these are its `.txt` and `.text` files, with `column` its `.csv`, `.tsv`, `.jsonl`, `.ndjson` and
    `.parquet` files, all but the last also with `.gz` or `.zst` behind, recursively, sorted by path. Left out, and
    counted, are other files, names that begin with a dot, links to folders, and folders that hold a tokenizer, a model
    or a run of `fastbert pretrain`: their vocabularies and logs are no text.

    `option` is what the program calls the setting `column`, for the messages.

    Raises:
        FileNotFoundError: no such path, or a folder without such files. OSError: a folder that cannot be listed.
        ValueError: a table without `column`, `column` with a text file, `separator` without a file that has one.
    """
    path = Path(path)
    if path.is_dir():
        files = _folder(path, TEXTS if column is None else TABLES)
    elif path.is_file():
        _check_file(path, column, separator, option)
        files = CorpusFiles([path], Counter())
    elif path.exists():
        raise ValueError(
            f"the corpus {path} is a pipe or a device, which can be read only once: write it to a file first"
        )
    else:
        raise FileNotFoundError(f"the corpus {path} does not exist: give a text file, a folder or a table")
    without = (is_json(file, separator) or is_parquet(file) for file in files.read)
    if separator is not None and (column is None or all(without)):
        raise ValueError(
            f"a separator stands between the columns of a table, and {path} is read as "
            f"{'plain text' if column is None else 'JSON or Parquet'}: leave the separator out"
        )
    return files


def _check_file(path: Path, column: str | None, separator: str | None, option: str) -> None:
    table = kind(path) in TABLES or is_json(path, separator) or separator is not None
    if table and column is None:
        names = column_names(path, separator)
        raise ValueError(f"{path} is a table: say which column holds the text ({option}), one of {names}")
    if column is not None and not table:
        raise ValueError(
            f"{path} is read as plain text, which has no column {column!r}: leave it out, or, for a table, name the "
            f"separator of its columns (--separator) or rename it to {', '.join(TABLES)}"
        )


def _folder(path: Path, suffixes: tuple[str, ...]) -> CorpusFiles:
    read, left_out = [], Counter()
    for name, folders, names in os.walk(path, onerror=_raise):
        here = Path(name)
        entered = []
        for folder in folders:
            if kind := _no_text(here / folder):
                left_out[kind] += 1
            else:
                entered.append(folder)
        folders[:] = entered  # what os.walk enters
        for file in map(here.joinpath, names):
            if file.name.startswith("."):
                left_out["hidden"] += 1
            elif not file.is_file():
                left_out["broken links or devices"] += 1
            elif _holds(file, suffixes):
                read.append(file)
            else:
                left_out[file.suffix.lower() or "without suffix"] += 1
    if not read:
        found = f"; it has {_counted(left_out)}" if left_out else ", it is empty"
        hint = "; for a column of tables name the column (--column)" if left_out.keys() & set(TABLES) else ""
        raise FileNotFoundError(
            f"the folder {path} holds no {' or '.join(suffixes)} files{found}{hint}; other text files are read when "
            "they are given alone, or renamed"
        )
    return CorpusFiles(sorted(read), left_out)


def _holds(file: Path, suffixes: tuple[str, ...]) -> bool:
    return kind(file) in suffixes and (file.suffix.lower() not in COMPRESSED or kind(file) != PARQUET)


def _no_text(folder: Path) -> str | None:
    """Why a folder is not entered, or None."""
    if folder.name.startswith("."):
        return "hidden"
    if folder.is_symlink():
        return "links to folders"
    names = set(os.listdir(folder))
    run_or_model = "config.json" in names and names & {"vocab.txt", "tokenizer", "snapshots"}
    if run_or_model or names & {"tokenizer.json", "tokenizer_config.json"}:
        return "folders of runs, models or tokenizers"
    return None


def _counted(kinds: Counter[str]) -> str:
    said = [f"{count:,} {kind}" for kind, count in kinds.most_common(_KINDS_SAID)]
    rest = kinds.total() - sum(count for _, count in kinds.most_common(_KINDS_SAID))
    return ", ".join([*said, f"{rest:,} of other kinds"] if rest else said)


def _raise(error: OSError) -> NoReturn:
    raise error
