"""Text to masked batches: corpus -> tokenizer -> token store -> samples -> batches.

Needs numpy, tokenizers and tqdm, which the extra `pretrain` brings.
"""

from fastbert import extras

if why := extras.missing("fastbert.data needs", "numpy", "tokenizers", "tqdm"):
    raise ImportError(why)

from fastbert.data.batch import Batch
from fastbert.data.batches import PretrainBatches
from fastbert.data.byte_bpe import train_byte_bpe
from fastbert.data.corpus import Reading, check_corpus, iter_documents
from fastbert.data.dictionary import Dictionary, read_words
from fastbert.data.masking import mask_tokens
from fastbert.data.sentences import split_sentences
from fastbert.data.shard_writer import prepare_store
from fastbert.data.shards import open_stores
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import (
    SpecialIds,
    continuations,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from fastbert.data.unigram import train_unigram
from fastbert.data.words import Words
from fastbert.data.writer import write_store, write_stores

__all__ = [
    "Batch",
    "Dictionary",
    "PretrainBatches",
    "Reading",
    "SpecialIds",
    "TokenStore",
    "Words",
    "check_corpus",
    "continuations",
    "iter_documents",
    "load_tokenizer",
    "mask_tokens",
    "open_stores",
    "prepare_store",
    "read_words",
    "save_tokenizer",
    "special_ids",
    "split_sentences",
    "train_byte_bpe",
    "train_tokenizer",
    "train_unigram",
    "write_store",
    "write_stores",
]
