"""A byte-level BPE tokenizer like RoBERTa's, trained on any text, in files that `transformers` loads as its own.

Text is read as bytes, so no character is unknown. A word begins with the space before it, written "Ġ", also at the
beginning of a text (RobertaTokenizer's `add_prefix_space`): a sentence's first word is the same token as elsewhere.
Sources: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (2016); Radford et
al., "Language models are unsupervised multitask learners" (2019); Liu et al., "RoBERTa" (2019).
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fastbert.data.tokenizer import BYTE_TOKENS, byte_tokenizer, check_training, count_words, repeated

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST = len(BYTE_TOKENS) + len(_BYTES)


def train_byte_bpe(
    texts: Iterable[str], vocab_size: int, lowercase: bool = False, *, min_frequency: int = 2, progress: bool = False
) -> Tokenizer:
    """Trains byte-level BPE on `texts`, read once and not kept; the same texts always give the same vocabulary.

    The special tokens have ids 0..4 in the order of `BYTE_TOKENS`, as in the published models but for <mask>, the 256
    bytes follow, then the merged pieces. `get_vocab_size()` may be less than asked for where the texts have too few
    words.

    Args:
        vocab_size: entries with special tokens and bytes, 261 to 16,777,216.
        lowercase: lower-case and strip accents, which RoBERTa's own does not.
        min_frequency: a pair of pieces seen less often is not merged.
        progress: prints a line between reading the texts and merging, which takes as long again.

    Raises:
        ValueError: vocab_size out of range, or no word in the texts. TypeError: one string in place of several.
    """
    check_training(texts, vocab_size)
    if vocab_size < SMALLEST:
        raise ValueError(
            f"vocab_size counts {len(BYTE_TOKENS)} special tokens and 256 bytes: expected >= {SMALLEST}, got "
            f"{vocab_size}"
        )
    empty = byte_tokenizer({token: i for i, token in enumerate(BYTE_TOKENS)}, [], lowercase)
    words = count_words(empty.normalizer, empty.pre_tokenizer, texts)
    if progress:
        print(f"tokenizer: {len(words):,} different words, merging their bytes into {vocab_size:,} entries", flush=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # the words are bytes already, of which none is a space
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=list(BYTE_TOKENS),
        initial_alphabet=_BYTES,
    )
    tokenizer.train_from_iterator(repeated(words), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return byte_tokenizer(trained["vocab"], [tuple(pair) for pair in trained["merges"]], lowercase)
