"""A WordPiece tokenizer like BERT's, trained on any text, in files that Hugging Face `transformers` loads."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastbert import files

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class SpecialIds(NamedTuple):
    """Ids of BERT's special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, *, min_frequency: int = 2
) -> Tokenizer:
    """Trains WordPiece on `texts`, read once and not kept; the same texts always give the same vocabulary.

    Normalisation and word splitting are BERT's; the special tokens have ids 0..4 in the order of `SPECIAL_TOKENS`.
    `get_vocab_size()` may be less than asked for where the texts have too few words. At most a third of the vocabulary
    goes to single characters, the most frequent ones.

    Args:
        vocab_size: entries with the special tokens, at least 64.
        lowercase: lower-case and strip accents, as BERT's "uncased" models do.
        min_frequency: a pair of pieces seen less often is not merged.

    Raises:
        ValueError: vocab_size too small, or no word in the texts.
    """
    if vocab_size < 64:
        raise ValueError(
            f"vocab_size counts special tokens, characters and word pieces: expected >= 64, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = _count_words(tokenizer, texts)
    if not words:
        raise ValueError("the texts hold no word: a tokenizer needs at least one")
    vocab = _word_pieces(words, vocab_size, min_frequency)

    tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    # The trainer counts words in parallel and keeps the counts in its pickled state, the only place that shows them.
    trainer = trainers.WordPieceTrainer(vocab_size=0, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    try:
        return json.loads(trainer.__getstate__())["WordPieceTrainer"]["bpe_trainer"]["words"]
    except (KeyError, ValueError) as error:
        raise RuntimeError(
            f"the trainer of tokenizers {tokenizers.__version__} does not show its word counts ({error!r}): install a "
            "version from 0.21 to 0.23"
        ) from error


def _word_pieces(words: dict[str, int], vocab_size: int, min_frequency: int) -> dict[str, int]:
    """Trains on counted words, so that nothing depends on the order of a hash table.

    The trainer numbers the `##` characters in the order of one, and breaks ties between pairs by these numbers, so that
    its vocabulary differs from run to run (huggingface/tokenizers#1794). Here they are numbered before, by declaring
    them special, and the alphabet is cut before, where ties go by character.
    """
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    alphabet = set(sorted(characters, key=lambda c: (-characters[c], c))[: vocab_size // 3])
    words = {word: count for word, count in words.items() if alphabet.issuperset(word)}
    continuations = sorted({"##" + character for word in words for character in word[1:]})

    def repeated() -> Iterator[str]:
        for word, count in sorted(words.items()):
            for left in range(count, 0, -4096):
                yield " ".join([word] * min(left, 4096))

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
    )
    tokenizer.train_from_iterator(repeated(), trainer)
    return tokenizer.get_vocab()


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt into `folder`.

    `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids. `max_length`: the model's longest sequence.
    Each file appears whole or not at all, tokenizer.json last, so where it is the others are.
    """
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    normalizer = json.loads(tokenizer.to_str())["normalizer"]
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        **({} if max_length is None else {"model_max_length": max_length}),
        **special,
    }
    contents = {
        "vocab.txt": "".join(token + "\n" for token in _by_id(tokenizer)),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    files.write(folder, {name: text.encode() for name, text in contents.items()})


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `save_tokenizer` or `transformers` wrote, without padding and truncation.

    Raises:
        FileNotFoundError: no tokenizer.json. ValueError: one that cannot be read.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give a folder written by save_tokenizer or by transformers' save_pretrained"
        )
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{file} is damaged or of a newer format ({error}): write it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK]; ValueError where one is missing."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if missing := [token for token, i in ids.items() if i is None]:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}: BERT needs {', '.join(SPECIAL_TOKENS)}")
    return SpecialIds(*ids.values())


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of what decides the ids: vocabulary, normalisation and word splitting."""
    whole = json.loads(tokenizer.to_str())
    parts = [_by_id(tokenizer), whole["normalizer"], whole["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _by_id(tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)
