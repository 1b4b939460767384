"""What a run knows of its text's words beside the vocabulary's pieces: --words and --dictionary."""

from fastbert import files
from fastbert.data.dictionary import read_words
from fastbert.data.words import Words
from fastbert.pretrain.settings import PretrainConfig

DICTIONARY = "dictionary.txt"  # in the run's folder, a copy


def words_of(config: PretrainConfig, resume: bool) -> Words | None:
    """How the run divides its text into words; None where the vocabulary alone says it.

    A resumed run reads the dictionary's copy.

    Raises:
        OSError, ValueError: a dictionary that is gone or does not hold. ImportError: a library is missing.
    """
    if config.words is None and config.dictionary is None:
        return None
    listed = []
    if config.dictionary is not None:
        listed = read_words(config.output / DICTIONARY if resume else config.dictionary)
    words = Words(config.words, tuple(listed))
    words.check()
    return words


def keep_dictionary(config: PretrainConfig) -> None:
    """Copies the dictionary of a new run into its folder; ValueError where another stands there."""
    if config.dictionary is None:
        return
    kept, content = config.output / DICTIONARY, config.dictionary.read_bytes()
    if kept.exists() and kept.read_bytes() != content:
        raise ValueError(
            f"{kept} is there already, with other words than {config.dictionary}, whose copy it would be: remove "
            "it, or choose another --output"
        )
    files.write(config.output, {DICTIONARY: content})
