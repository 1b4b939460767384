"""A trained teacher, tables and unlabelled texts."""

import pytest
from finetune_tables import make_encoder, rows, write

pytest.importorskip("sklearn")

from fastbert.finetune import FinetuneConfig, finetune


@pytest.fixture(scope="session")
def lesson(tmp_path_factory):
    """A folder with teacher/model, train.csv of 96 rows, new.csv of 24 and more.txt of 100 texts and an empty line."""
    folder = tmp_path_factory.mktemp("lesson")
    train = write(folder / "train.csv", rows(96))
    write(folder / "new.csv", rows(24, seed=1))
    (folder / "more.txt").write_text("\n".join(["", *(row["text"] for row in rows(100, seed=2))]))
    encoder = make_encoder("bert", folder / "bert")
    finetune(FinetuneConfig(encoder, train, folder / "teacher", lr=1e-2, epochs=8, patience=8, batch_size=16))
    return folder
