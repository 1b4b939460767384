"""What the teacher makes of unlabelled texts, made once and kept: a store of tokens and logits on disk.

A store is a folder of parts, each of up to 8,192 texts: their ids, int32 [T], where each begins, int64 [N + 1], and
the teacher's logits, bfloat16 [N, C], as safetensors. `manifest.json` says whose logits and which texts' these are, and
each part's size and SHA-256. Parts are written whole, one after another, so labelling goes on behind the last that is
there; they are read through the system's page cache, so that memory does not grow with the number of texts.
"""

import bisect
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from fastbert import files, lock
from fastbert.data.texts import Encoded, Texts, encode, iter_texts
from fastbert.data.tokenizer import load_tokenizer
from fastbert.distill.settings import DistillConfig
from fastbert.finetune.predict import logits_of
from fastbert.models.classification import SequenceClassifier
from fastbert.models.encoder import PreTrainedModel
from fastbert.signals import stop_signals

PART = 8192  # texts: what is lost where labelling is broken off, and what is held in memory
LABELLED = 8192  # tokens at a time
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """Unlabelled texts, and who labels them.

    Attributes:
        config: says how they are read.
        files: where they are.
        longest: tokens at which they are cut off.
        count: how many there are.
        texts, teacher, tokenizer: SHA-256 of what they hold.
    """

    config: DistillConfig
    files: tuple[Path, ...]
    longest: int
    count: int
    texts: str
    teacher: str
    tokenizer: str

    @classmethod
    def of(cls, config: DistillConfig, teacher: SequenceClassifier, more: Sequence[Path] = ()) -> Self:
        """The unlabelled texts that the settings name, and those in `more` files.

        Reads all texts once, so that one that cannot be read is told before any is labelled.

        Raises:
            FileNotFoundError, ValueError: as `iter_texts`; files without any text.
        """
        digest, count, named = hashlib.sha256(), 0, (*config.unlabelled, *more)
        for text in tqdm(_texts(config, named), desc="reading unlabelled texts", unit="text", leave=False):
            digest.update(len(text).to_bytes(8, "little") + text.encode())
            count += 1
        if not count:
            raise ValueError(f"there is no text in {', '.join(map(str, named))}: name files with a text a line")
        words = hashlib.sha256(load_tokenizer(config.teacher).to_str().encode())
        longest = teacher.config.longest if config.seq_len is None else config.seq_len
        return cls(config, named, longest, count, digest.hexdigest(), digest_of(teacher), words.hexdigest())

    def identity(self) -> dict[str, Any]:
        """What a store must have been made of to be this one's."""
        return {
            "teacher": self.teacher, "tokenizer": self.tokenizer, "texts": self.texts, "count": self.count,
            "tokens of a text": self.longest,
        }  # fmt: skip


def digest_of(model: PreTrainedModel) -> str:
    """SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256(files.json_text(model.fields()).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _texts(config: DistillConfig, named: Sequence[Path]) -> Iterator[str]:
    for path in named:
        yield from iter_texts(path, config.text, separator=config.separator, quoting=config.quoting)


class _Part(NamedTuple):
    """One file of a store, mapped into memory."""

    ids: Tensor
    starts: Tensor
    logits: Tensor


class Labels:
    """A whole store, to be read at any place.

    Args:
        folder: where it is. parts: names of its files, and how many texts each has.
    """

    def __init__(self, folder: Path, parts: dict[str, int]):
        self.parts, self.ends = [], []
        for name, texts in parts.items():
            with safe_open(folder / name, framework="pt") as file:
                self.parts.append(_Part(*(file.get_tensor(field) for field in _Part._fields)))
            self.ends.append(texts + (self.ends[-1] if self.ends else 0))

    def __len__(self) -> int:
        return self.ends[-1]

    def take(self, places: Tensor) -> tuple[list[Encoded], Tensor]:
        """The texts at these places, int64 [B], and the teacher's logits for them, float32 [B, C]."""
        encoded, logits = [], []
        for place in places.tolist():
            number = bisect.bisect_right(self.ends, place)
            part = self.parts[number]
            row = place - (self.ends[number - 1] if number else 0)
            first, last = part.starts[row : row + 2].tolist()
            ids = part.ids[first:last].tolist()
            encoded.append(Encoded(ids, [0] * len(ids), False))
            logits.append(part.logits[row])
        return encoded, torch.stack(logits).float()


def label(source: Source, teacher: SequenceClassifier, tokenizer: Tokenizer, config: DistillConfig) -> Labels | None:
    """The store of these texts: the one that is there, after it was checked, or what was missing of it made first.

    Args:
        source: the texts, and the teacher's identity.
        teacher: in evaluation mode, on the configuration's device.

    Returns:
        None where Ctrl-C or SIGTERM stopped it; the next call goes on.

    Raises:
        ValueError: a folder that holds something else: another teacher's outputs, those for other texts, a part that is
            damaged. BlockingIOError: another process labels there. OSError: it cannot be written.
    """
    folder, identity = config.store_folder, source.identity()
    refuse_other(folder, identity)
    with lock.hold(folder, "labels texts there", "Ctrl-C or SIGTERM keeps what it has labelled"):
        made = _there(folder)
        done = sum(part["texts"] for part in made)
        texts = islice(_texts(config, source.files), done, None)
        bar = tqdm(total=source.count, initial=done, desc="labelling", unit="text", dynamic_ncols=True, leave=False)
        with stop_signals() as stopped, bar:
            while some := list(islice(texts, PART)):
                if stopped:
                    return None
                encoded = encode(
                    tokenizer, Texts(list(range(1, len(some) + 1)), some, None, None), source.longest,
                    teacher.config.vocab_size,
                )  # fmt: skip
                logits = logits_of(teacher, encoded, config, LABELLED)
                made.append(_write_part(folder, f"part-{len(made):05d}.safetensors", encoded, logits))
                files.write(folder, {MANIFEST: files.json_text({"of": identity, "parts": made}, 2).encode()})
                bar.update(len(some))
    if sum(part["texts"] for part in made) != source.count:
        raise ValueError(f"{', '.join(map(str, source.files))} changed while the teacher labelled them: start again")
    return Labels(folder, {part["name"]: part["texts"] for part in made})


def _write_part(folder: Path, name: str, encoded: list[Encoded], logits: Tensor) -> dict[str, Any]:
    """Writes a part; returns what the manifest says of it."""
    if not logits.isfinite().all():
        raise ValueError("the teacher's outputs for unlabelled texts are not finite: it diverged; take another teacher")
    starts = torch.tensor([0, *(len(each.ids) for each in encoded)]).cumsum(0)
    ids = torch.tensor([i for each in encoded for i in each.ids], dtype=torch.int32)
    content = save({"ids": ids, "starts": starts, "logits": logits.bfloat16()})
    files.write(folder, {name: content})
    digest = hashlib.sha256(content).hexdigest()
    return {"name": name, "texts": len(encoded), "bytes": len(content), "sha256": digest}


def refuse_other(folder: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError where `folder` holds something that is no store of this identity; reads its manifest alone."""
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder, and a store of labels is one: name another --store")
    if not path.exists():
        for each in folder.iterdir() if folder.is_dir() else ():
            if not each.name.startswith((".", "part-")):
                raise ValueError(f"{folder} is no store of labels, it holds {each.name}: name another --store")
        return
    with _as_manifest(path):
        of = files.json_object(path)["of"]
        different = [name for name, value in identity.items() if of[name] != value]
    if different:
        raise ValueError(
            f"{folder} holds a teacher's outputs that are not those asked for, its {', '.join(different)} differing: "
            "name another --store, or the teacher and texts it was made with"
        )


def _there(folder: Path) -> list[dict[str, Any]]:
    """What the manifest says of the parts that are there, after they were read and compared with it."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    with _as_manifest(path):
        parts = files.json_object(path)["parts"]
        for part in parts:
            content = folder / part["name"]
            with files.naming(content), content.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != part["sha256"]:
                raise ValueError(f"{content.name} does not match the checksum in it")
    return parts


@contextlib.contextmanager
def _as_manifest(path: Path) -> Iterator[None]:
    """What is wrong within the block is said of the store."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {error}. Put its folder back as it was, or remove it") from error
