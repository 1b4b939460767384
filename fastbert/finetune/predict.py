"""Labels or numbers for new texts, by a classifier's folder: what `fastbert predict` runs."""

import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastbert import allocator, files
from fastbert.data.texts import Encoded, PackedTexts, batches_by_length, encode, pack, read_texts
from fastbert.data.tokenizer import load_tokenizer
from fastbert.finetune.settings import PredictConfig, TaskConfig
from fastbert.models.auto import class_of
from fastbert.models.checkpoint import UNTRAINED, read_config
from fastbert.models.classification import CLASSIFIERS, SequenceClassifier
from fastbert.models.features import KIND, FeatureClassifier
from fastbert.models.frozen import freeze
from fastbert.models.small import SMALL, SmallClassifier

Classifier = SequenceClassifier | SmallClassifier | FeatureClassifier


def predict(config: PredictConfig) -> None:
    """Predicts a row for every row of the table, or line of the text file, in its order; empty texts too.

    Raises:
        FileNotFoundError, ValueError, OSError: settings, folder or file that do not hold, before anything is written.
    """
    config.check()
    allocator.keep_memory()
    texts = read_texts(config.file, config.text, config.pair, separator=config.separator, quoting=config.quoting)
    model = load(config.folder).to(config.device)
    expect_pairs(model, config.pair, config.folder)
    encoded = encode(load_tokenizer(config.folder), texts, model.config.longest, model.config.vocab_size)
    if torch.device(config.device).type == "cpu" and isinstance(model, SequenceClassifier):
        freeze(model, torch.bfloat16 if config.bf16 else None)
    outputs = logits_of(model, encoded, config, config.batch_tokens)
    content = _rows(outputs, model, ".tsv" if config.output is None else config.output.suffix)
    if config.output is None:
        sys.stdout.write(content)
    else:
        files.write(config.output.absolute().parent, {config.output.name: content.encode()})
        print(f"{len(encoded):,} rows in {config.output}")


def autocast(config: TaskConfig | PredictConfig) -> torch.autocast:
    """To bfloat16 on the configuration's device where it says so."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)


def packed_logits(model: Classifier, encoded: Sequence[Encoded]) -> Tensor:
    """float32 [texts, labels], on the model's device."""
    sizes = model.config
    multiple = 1 if isinstance(model, SmallClassifier) else 64
    packed = pack(encoded, sizes.pad_token_id, sizes.type_vocab_size, sizes.longest, multiple)
    return model(**packed.arguments(model.classifier.weight.device)).logits[: len(encoded)].float()


def logits_of(model: Classifier, encoded: Sequence[Encoded], config: TaskConfig | PredictConfig, tokens: int) -> Tensor:
    """float32 [texts, labels] on the CPU, in the order of the texts, without dropout; `tokens` are computed at a time.

    The model is left in evaluation mode.
    """
    model.eval()
    logits = torch.empty(len(encoded), len(model.labels))
    multiple = 1 if isinstance(model, SmallClassifier) else 64
    with torch.inference_mode(), autocast(config):
        for places, packed in computed(encoded, model.config, tokens, "predicting", multiple):
            logits[places] = (
                model(**packed.arguments(model.classifier.weight.device)).logits[: len(places)].float().cpu()
            )
    return logits


def computed(
    encoded: Sequence[Encoded], sizes: Any, tokens: int, doing: str, multiple: int = 64
) -> Iterator[tuple[list[int], PackedTexts]]:
    """Places of texts and these packed, of like length and so many tokens at a time; a bar says what is being done."""
    with tqdm(total=len(encoded), desc=doing, unit="text", leave=False) as bar:
        for places in batches_by_length(encoded, tokens):
            some = [encoded[i] for i in places]
            yield places, pack(some, sizes.pad_token_id, sizes.type_vocab_size, sizes.longest, multiple)
            bar.update(len(places))


def load(folder: Path) -> Classifier:
    """The classifier in `folder`; raises ValueError where it has none that was trained."""
    kind = read_config(folder).get("model_type")
    if kind == KIND:
        return FeatureClassifier.from_pretrained(folder)
    small = SMALL.get(kind)
    if small is not None:
        return small.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return class_of(folder, CLASSIFIERS).from_pretrained(folder)
        except UserWarning as warning:
            lacking = str(warning).removesuffix(f": {UNTRAINED}")
            raise ValueError(
                f"{lacking}: expected a classifier's folder, such as model/ of fastbert finetune or distill"
            ) from None


def expect_pairs(model: Classifier, pair: str | None, folder: Path) -> None:
    """Raises ValueError where a classifier that was trained on pairs is given single texts, or the reverse."""
    if model.pairs and pair is None:
        raise ValueError(
            f"the classifier in {folder} was trained on pairs of texts: name the column of the second one (--pair)"
        )
    if model.pairs is False and pair is not None:
        raise ValueError(f"the classifier in {folder} was trained on single texts: leave --pair {pair} out")


def _rows(outputs: Tensor, model: Classifier, suffix: str) -> str:
    """What is predicted, a row each: JSON lines, or a header and columns."""
    if model.problem_type == "regression":
        names, rows = [model.labels[0]], [[value] for value in outputs[:, 0].tolist()]
        objects = [{names[0]: value} for (value,) in rows]
    else:
        probabilities = outputs.double().softmax(-1)
        best, places = (x.tolist() for x in probabilities.max(-1))
        names = ["label", "probability"]
        rows = [[model.labels[place], f"{p:.6f}"] for place, p in zip(places, best, strict=True)]
        objects = [
            {"label": model.labels[place], "probabilities": dict(zip(model.labels, each, strict=True))}
            for place, each in zip(places, probabilities.tolist(), strict=True)
        ]
    if suffix == ".jsonl":
        return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writerows([names, *rows])
    return text.getvalue()
