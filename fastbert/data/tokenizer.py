"""A WordPiece tokenizer like BERT's, trained on any text, in files that Hugging Face `transformers` loads."""

import hashlib
import heapq
import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from fastbert import files, tokenizer_files

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTE_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's
# The trainer sets about 100 bytes an entry aside before it starts, 1.6 GB here, and the word embeddings of a model of
# 128 dimensions would take 8.6 GB. The largest vocabularies in use have a million entries.
LARGEST_VOCABULARY = 1 << 24
LONGEST_WORD = 100  # characters; WordPiece reads a longer word as [UNK]


class SpecialIds(NamedTuple):
    """Ids of BERT's special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, *, min_frequency: int = 2, progress: bool = False
) -> Tokenizer:
    """Trains WordPiece on `texts`, read once and not kept; the same texts always give the same vocabulary.

    Normalisation and word splitting are BERT's; the special tokens have ids 0..4 in the order of `SPECIAL_TOKENS`.
    `get_vocab_size()` may be less than asked for where the texts have too few words. The most frequent characters are a
    third of the vocabulary, and as many more as pieces of several characters leave room for: a page of Chinese has
    thousands of characters and hardly anything to merge. Words of more than 100 characters count for nothing, as
    WordPiece reads them as [UNK].

    Args:
        vocab_size: entries with the special tokens, 64 to 16,777,216.
        lowercase: lower-case and strip accents, as BERT's "uncased" models do.
        min_frequency: a pair of pieces seen less often is not merged.
        progress: prints a line between reading the texts and merging, which takes as long again.

    Raises:
        ValueError: vocab_size out of range, or no word in the texts.
    """
    check_training(texts, vocab_size)
    words = count_words(normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer(), texts)
    short = {word: count for word, count in words.items() if len(word) <= LONGEST_WORD}
    if not short:
        raise ValueError(
            f"the texts hold no word of at most {LONGEST_WORD} characters, and WordPiece knows no longer one: words "
            "end at spaces and punctuation, so put spaces between the words of a language that is written without"
        )
    if progress:
        print(
            f"tokenizer: {len(short):,} different words, merging their pieces into {vocab_size:,} entries", flush=True
        )
    vocab = _word_pieces(short, vocab_size, min_frequency)

    return _bert_tokenizer(vocab, lowercase)


def _bert_tokenizer(vocab: dict[str, int], lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def byte_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], lowercase: bool = False, add_prefix_space: bool = True
) -> Tokenizer:
    """RoBERTa's tokenizer: byte-level BPE, <s> A </s> and <s> A </s></s> B </s>, <mask> without the space before."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    if lowercase:
        parts = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.add_special_tokens([AddedToken(token, lstrip=token == "<mask>") for token in BYTE_TOKENS])
    tokenizer.decoder = decoders.ByteLevel()
    sep, cls = (("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, True, add_prefix_space)
    return tokenizer


def check_training(texts: Iterable[str], vocab_size: int) -> None:
    """Raises where a tokenizer cannot be trained with these."""
    if not 64 <= vocab_size <= LARGEST_VOCABULARY:
        rule = ">= 64" if vocab_size < 64 else f"<= {LARGEST_VOCABULARY}"
        raise ValueError(
            f"vocab_size counts special tokens, characters and word pieces: expected {rule}, got {vocab_size}"
        )
    if isinstance(texts, str):
        raise TypeError(
            "texts are several strings, such as lines or sentences, and one string came: put it into a list"
        )


def count_words(normalizer: Normalizer | None, pre_tokenizer: PreTokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How often each word occurs, which are what the two make of the texts; ValueError where there is none."""
    # The trainer counts words in parallel and keeps the counts in its pickled state, the only place that shows them.
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=0, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    try:
        words = json.loads(trainer.__getstate__())["WordPieceTrainer"]["bpe_trainer"]["words"]
    except (KeyError, ValueError) as error:
        raise RuntimeError(
            f"the trainer of tokenizers {tokenizers.__version__} does not show its word counts ({error!r}): install a "
            "version from 0.21 to 0.23"
        ) from error
    if not words:
        raise ValueError("the texts hold no word: a tokenizer needs at least one")
    return words


def repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Texts in which each word occurs as often as its count says, words in order."""
    for word, count in sorted(words.items()):
        for left in range(count, 0, -4096):
            yield " ".join([word] * min(left, 4096))


def _word_pieces(words: dict[str, int], vocab_size: int, min_frequency: int) -> dict[str, int]:
    """A vocabulary of pieces of counted words, which does not depend on the order of a hash table.

    The trainer numbers the `##` characters in the order of one, and breaks ties between pairs by these numbers, so that
    its vocabulary differs from run to run (huggingface/tokenizers#1794). Here they are numbered before, by declaring
    them special, and the alphabet is cut before, where ties go by character.
    """
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    alphabet = set(most_frequent(characters, vocab_size // 3))
    spelled = {word: count for word, count in words.items() if alphabet.issuperset(word)}
    continuations = sorted({"##" + character for word in spelled for character in word[1:]})

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
    )
    tokenizer.train_from_iterator(repeated(spelled), trainer)
    vocab = tokenizer.get_vocab()

    # Where the merges leave room, the characters that were cut take it.
    missing: Counter[str] = Counter()
    for word, count in words.items():
        for piece in (word[0], *("##" + character for character in word[1:])):
            if piece not in vocab:
                missing[piece] += count
    for piece in most_frequent(missing, max(0, vocab_size - len(vocab))):
        vocab[piece] = len(vocab)
    return vocab


def most_frequent(counts: Counter[str], n: int) -> list[str]:
    """The n largest, equal ones in the order of their characters."""
    return heapq.nsmallest(n, counts, key=lambda item: (-counts[item], item))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int | None = None) -> None:
    """Writes the vocabulary, special_tokens_map.json, tokenizer_config.json and tokenizer.json into `folder`.

    `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids. `max_length`: the model's longest sequence.
    The vocabulary is vocab.txt, of BPE vocab.json and merges.txt. Tokens that were added to it stand in
    added_tokens.json too. Each file appears whole or not at all, tokenizer.json last, so where it is the others are; an
    earlier tokenizer's files are replaced or removed.

    Raises:
        ValueError: two tokens have the same id.
    """
    contents = tokenizer_files.make(tokenizer, max_length)
    files.write(folder, contents)
    tokenizer_files.remove_others(folder, contents)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `save_tokenizer` or `transformers` wrote, without padding and truncation.

    Reads tokenizer.json, or where there is none vocab.txt, as in older BERT folders, or vocab.json and merges.txt, as
    in older RoBERTa folders; and beside it, as `transformers` does, tokenizer_config.json, special_tokens_map.json and
    added_tokens.json.

    Raises:
        FileNotFoundError: none of these.
        ValueError: a file that cannot be read, a vocabulary with a token twice or without the model's special tokens,
            or an added token whose id another one has.
    """
    folder = Path(folder)
    file, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    settings = _read_json(folder / "tokenizer_config.json")
    if file.is_file():
        files.refuse_lfs_pointer(file)
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{file} is damaged or of a newer format ({error}): write it again") from error
    elif vocabulary.is_file():
        tokenizer = _bert_tokenizer(_read_vocabulary(vocabulary))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _read_byte_tokenizer(folder, settings)
    else:
        raise FileNotFoundError(
            f"{file} does not exist, nor vocab.txt, nor vocab.json with merges.txt: give a folder written by "
            "save_tokenizer or by transformers' save_pretrained"
        )
    if settings.get("tokenizer_class", "BertTokenizer") in ("BertTokenizer", "BertTokenizerFast"):
        _follow(settings, tokenizer.normalizer)
    _add_tokens(tokenizer, folder, settings)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}: fetch or write it again")
    return value


def _read_vocabulary(path: Path) -> dict[str, int]:
    """vocab.txt: a token's id is its line, counted from 0."""
    files.refuse_lfs_pointer(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): fetch it again") from error
    vocab: dict[str, int] = {}
    for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines):
        if vocab.setdefault(token, i) != i:
            raise ValueError(
                f"{path} has the token {token!r} in line {vocab[token] + 1} and again in line {i + 1}: a token's id is "
                "its line, so each may stand there once; rename the one that the model was not trained with"
            )
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: BERT needs {', '.join(SPECIAL_TOKENS)}")
    return vocab


def _read_byte_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """RoBERTa's, of vocab.json and merges.txt: a pair a line, behind a first line with a version."""
    vocab = _read_json(folder / "vocab.json")
    path = folder / "merges.txt"
    if missing := [token for token in BYTE_TOKENS if token not in vocab]:
        raise ValueError(f"{folder / 'vocab.json'} lacks {', '.join(missing)}: RoBERTa needs {', '.join(BYTE_TOKENS)}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        return byte_tokenizer(vocab, merges, add_prefix_space=settings.get("add_prefix_space", False))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{path} does not hold the merges of vocab.json ({error}): fetch both again") from error


def _follow(settings: dict[str, Any], normalizer: Any) -> None:
    """Sets the normaliser as tokenizer_config.json says, which `transformers` heeds more than tokenizer.json."""
    fields = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
    fields["tokenize_chinese_chars"] = "handle_chinese_chars"
    if isinstance(normalizer, normalizers.BertNormalizer):
        for setting, field in fields.items():
            if settings.get(setting) is not None:
                setattr(normalizer, field, settings[setting])


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    """Adds what the files beside tokenizer.json or vocab.txt name: ids in the order given, then special tokens."""
    names = _read_json(folder / "special_tokens_map.json") | settings
    special = [
        token["content"] if isinstance(token, dict) else token
        for field in ("additional_special_tokens", "extra_special_tokens")
        for token in names.get(field) or []
    ]
    if listed := settings.get("added_tokens_decoder"):
        added = [(int(i), AddedToken(**token)) for i, token in listed.items()]
    else:
        found = _read_json(folder / "added_tokens.json").items()
        added = [
            (i, AddedToken(token, normalized=token not in special, special=token in special)) for token, i in found
        ]
    for i, token in sorted(added, key=lambda pair: pair[0]):
        if token.content not in _added(tokenizer):
            tokenizer.add_tokens([token])
        if (given := tokenizer.token_to_id(token.content)) != i:
            raise ValueError(
                f"{folder}: the added token {token.content!r} should have id {i}, and {given} comes next behind the "
                "vocabulary: vocabulary and added tokens belong to different tokenizers"
            )
    tokenizer.add_special_tokens([token for token in special if token not in _added(tokenizer)])


def _added(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}


def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of an embedding for the tokenizer's ids: the highest id + 1, which unused ids make more than its tokens."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK], or as others spell them; ValueError where one is missing."""
    vocab = tokenizer.get_vocab()
    tokens = tokenizer_files.special_tokens(vocab)
    if missing := [token for token in SPECIAL_TOKENS if token.strip("[]").lower() not in tokens]:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}: BERT and ALBERT need {', '.join(SPECIAL_TOKENS)}, each also "
            f"spelled as <pad> is; RoBERTa {', '.join(BYTE_TOKENS)}"
        )
    return SpecialIds(**{role: vocab[token] for role, token in tokens.items()})


def continuations(tokenizer: Tokenizer) -> np.ndarray:
    """Which ids continue the word before them: bool [rows of an embedding, see `vocab_size`].

    In WordPiece these are the pieces with "##"; in byte-level BPE those without "Ġ", the space before a word, as in
    RoBERTa's own program. In Unigram they follow ALBERT's own program: pieces of letters and of punctuation, but for a
    single mark; a piece with "▁", a digit or one of `'<=>` begins a word. That program knows the letters of English
    alone, and here letters of every script that is written with spaces are such, so that words of other languages are
    masked whole too; Chinese characters begin a word in both. Special tokens, and others that were added to a
    vocabulary, always begin one.
    """
    continues = np.zeros(vocab_size(tokenizer), bool)
    vocab = tokenizer.get_vocab()
    for token, i in vocab.items():
        if isinstance(tokenizer.model, models.Unigram):
            continues[i] = _in_a_word(token)
        elif isinstance(tokenizer.model, models.BPE):
            continues[i] = not token.startswith("Ġ")
        else:
            continues[i] = token.startswith("##")
    special = [vocab[token] for token in tokenizer_files.special_tokens(vocab).values()]
    continues[[*special, *tokenizer.get_added_tokens_decoder()]] = False
    return continues


_MARKS = frozenset(string.punctuation) - frozenset("'<=>")


def _in_a_word(piece: str) -> bool:
    return piece not in _MARKS and all(character in _MARKS or _is_letter(character) for character in piece)


def _is_letter(character: str) -> bool:
    """Of a script that is written with spaces between words, or a mark on such a letter."""
    return unicodedata.category(character)[0] in "LM" and not is_wide(character)


def is_wide(character: str) -> bool:
    """Chinese, Japanese or Korean: of a script without spaces between words, or whose words take endings."""
    return unicodedata.east_asian_width(character) in "WF"


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of what decides the ids: vocabulary, Unigram's scores, BPE's merges, normalisation, splitting."""
    whole = json.loads(tokenizer.to_str())
    parts = [_by_id(tokenizer), whole["normalizer"], whole["pre_tokenizer"]]
    if isinstance(tokenizer.model, models.Unigram):
        parts.append(whole["model"]["vocab"])
    if isinstance(tokenizer.model, models.BPE):
        parts.append(whole["model"]["merges"])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _by_id(tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)
