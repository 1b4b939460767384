"""A Unigram tokenizer like ALBERT's, trained on any text, in files that `transformers` loads as its AlbertTokenizer.

Normalisation and word splitting are AlbertTokenizer's: two backquotes or apostrophes are a quotation mark, text is
decomposed and loses its accents and capitals, words end at white space and begin with "▁". Punctuation stays with its
word until the model cuts it off. Source: Kudo, "Subword regularization" (2018), and SentencePiece.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastbert.data.tokenizer import SPECIAL_TOKENS, check_training, count_words, most_frequent, repeated

_LONGEST = 1000  # characters of a word looked at together
# Special tokens are pieces of the model too: where text spells them out, letter by letter must be likelier.
_NEVER = -1000.0
_MOST = 0.9  # of the text, that words seen more than once must make up for the others to be left out
_STEP = 1e-4  # between the scores that the trainer gives to characters that it had pruned


def train_unigram(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, *, min_frequency: int = 2, progress: bool = False
) -> Tokenizer:
    """Trains Unigram on `texts`, read once and not kept.

    The special tokens have ids 0..4 in the order of `SPECIAL_TOKENS`; the other pieces follow, the likeliest first. The
    most frequent characters, at most a third of the vocabulary, are pieces, the others are read as [UNK]. Without
    lower-casing the letters of the special tokens are pieces too: text that spells these out is read in letters.
    `get_vocab_size()` may be less than asked for where the texts have too few words.

    The trainer of `tokenizers` adds numbers up in the order of a hash table, which changes their last digits from run
    to run. Scores are rounded to thousandths and equal ones go by their piece, so that the same texts give the same
    vocabulary unless a score lies within such a digit of a rounding edge.

    Args:
        vocab_size: entries with the special tokens, 64 to 16,777,216.
        lowercase: lower-case and strip accents.
        min_frequency: words seen less often teach nothing, where the others are nine tenths of the text.
        progress: prints a line between reading the texts and training, which takes longer.

    Raises:
        ValueError: vocab_size out of range, or no word in the texts. TypeError: one string in place of several.
    """
    check_training(texts, vocab_size)
    empty = _albert_tokenizer([(token, _NEVER) for token in SPECIAL_TOKENS], lowercase)
    words = count_words(empty.normalizer, empty.pre_tokenizer, texts)
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    spelling = set() if lowercase else set("".join(SPECIAL_TOKENS))
    alphabet = spelling | set(most_frequent(characters, vocab_size // 3))
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for part in _parts(word, alphabet):
            parts[part] += count
    often = {part: count for part, count in parts.items() if count >= min_frequency}
    if _length(often) < _MOST * _length(parts):  # as where words have no spaces between them
        often = parts
    if progress:
        print(f"tokenizer: {len(often):,} different words, looking for the likeliest {vocab_size:,} pieces", flush=True)

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        unk_token="[UNK]",
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(repeated(often), trainer)
    trained = json.loads(tokenizer.to_str())["model"]["vocab"]
    return _albert_tokenizer(_settled(trained), lowercase)


def _parts(word: str, alphabet: set[str]) -> Iterator[str]:
    """What of a word lies between characters that are not in the alphabet, in stretches of bounded length."""
    for part in "".join(character if character in alphabet else " " for character in word).split():
        for start in range(0, len(part), _LONGEST):
            yield part[start : start + _LONGEST]


def _length(words: Mapping[str, int]) -> int:
    return sum(len(word) * count for word, count in words.items())


def _settled(trained: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The vocabulary in an order and with scores that do not show in which order the trainer added up."""
    pieces = [(piece, score) for piece, score in trained if piece not in SPECIAL_TOKENS]
    lowest = min(score for _, score in pieces)
    characters = sum(len(piece) == 1 for piece, _ in pieces)

    def rounded(piece: str, score: float) -> float:
        pruned = len(piece) == 1 and score < lowest + _STEP * (characters + 1)
        return round(lowest if pruned else score, 3)

    scored = [(piece, rounded(piece, score)) for piece, score in pieces]
    scored.sort(key=lambda pair: (-pair[1], pair[0]))
    return [*((token, _NEVER) for token in SPECIAL_TOKENS), *scored]


def _albert_tokenizer(vocab: list[tuple[str, float]], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL_TOKENS.index("[UNK]"), byte_fallback=False))
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    plain = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence([*quotes, *plain])
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer
