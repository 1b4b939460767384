"""Stores of nine shards of Python's own manual, which comes with the standard library."""

from pydoc_data.topics import topics

from fastbert.data import Reading, prepare_store

TEXTS = [text for _, text in sorted(topics.items())][:60]
SHARD = 24_000  # bytes of text, which makes nine of them


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def again(folder, corpus, tokenizer, **options):
    options = {"held_out": 0.1, "shard_bytes": SHARD, "progress": False} | options
    prepare_store(folder, corpus, Reading(), tokenizer, **options)
