"""Text to masked batches: corpus -> tokenizer -> token store -> samples -> batches.

Needs numpy, tokenizers and tqdm: `pip install "fastbert-kernels[pretrain]"`.
"""

from importlib.util import find_spec

if missing := [name for name in ("numpy", "tokenizers", "tqdm") if find_spec(name) is None]:
    raise ImportError(f'fastbert.data needs {", ".join(missing)}: pip install "fastbert-kernels[pretrain]"')

from fastbert.data.batches import Batch, PretrainBatches
from fastbert.data.corpus import check_corpus, iter_documents
from fastbert.data.masking import mask_tokens
from fastbert.data.sentences import split_sentences
from fastbert.data.store import TokenStore, write_store, write_stores
from fastbert.data.tokenizer import SpecialIds, load_tokenizer, save_tokenizer, special_ids, train_tokenizer

__all__ = [
    "Batch",
    "PretrainBatches",
    "SpecialIds",
    "TokenStore",
    "check_corpus",
    "iter_documents",
    "load_tokenizer",
    "mask_tokens",
    "save_tokenizer",
    "special_ids",
    "split_sentences",
    "train_tokenizer",
    "write_store",
    "write_stores",
]
