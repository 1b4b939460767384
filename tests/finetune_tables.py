"""Tables of labelled texts that a small encoder learns in seconds, and such encoders."""

import csv
import random

import torch

from fastbert.data import train_byte_bpe, train_tokenizer
from fastbert.models.auto import ENCODERS

SENTENCE = "the film was a story about two people who went to the sea and came back by night"
SIGNS = {"good": ["great", "lovely"], "poor": ["awful", "boring"], "so, so": ["mixed", "uneven"]}


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A word of each text tells its label."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        label = list(SIGNS)[i % 3]
        words = [*draw.choices(SENTENCE.split(), k=draw.randint(2, 12)), draw.choice(SIGNS[label])]
        draw.shuffle(words)
        made.append(
            {"text": " ".join(words), "second": "the story", "label": label, "number": str(1000 + 50 * (i % 3))}
        )
    return made


def write(path, table):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return path


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def make_encoder(kind, folder, dropout=0.0, **fields):
    """The folder, with an untrained encoder of this kind and its tokenizer."""
    texts = [row["text"] for row in rows(60)]
    tokenizer = train_byte_bpe(texts, 400) if kind == "roberta" else train_tokenizer(texts, 150)
    torch.manual_seed(1)
    cls = ENCODERS[kind]
    size = max(tokenizer.get_vocab().values()) + 1
    config = cls.config_class.preset(
        "tiny", vocab_size=size, hidden_size=32, intermediate_size=64, max_position_embeddings=32,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_hidden_layers=1, initializer_range=0.1,
        **fields,
    )  # fmt: skip
    cls(config).save_pretrained(folder, tokenizer)
    return folder
