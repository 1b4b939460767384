"""More texts to learn from: copies of the labelled ones with words replaced, as TinyBERT's data augmentation.

For every text, `copies` times: each of its words is replaced with a probability, by one of its candidates at random. A
word that is one piece of the vocabulary has as candidates the most probable words in its place, by a masked language
model that does not see it; a word of several pieces those with the nearest vectors. The copies have no labels; a
teacher says what they are.

Source: Jiao et al., "TinyBERT: distilling BERT for natural language understanding" (2020), algorithm 1, where the
probability is 0.4, and 20 copies and 15 candidates are made. There word vectors are GloVe's; here they are the model's
own word embeddings, those of several pieces averaged, and near is by cosine. A word is not among its own candidates,
and only letters and digits are words.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from fastbert import files
from fastbert.data.tokenizer import continuations, load_tokenizer, special_ids, vocab_size
from fastbert.distill.settings import DistillConfig
from fastbert.fill import likeliest, load_masked_lm
from fastbert.models.pretraining import PreTrainingModel
from fastbert.signals import stop_signals

AT_ONCE = 64  # texts that are augmented, and written, together
MADE, PART = "augmented.txt", "augmented.part"  # in the run's folder
OF = "augmented.sha256"  # there: the digest of the texts of which copies were begun

Word = tuple[int, int, tuple[int, ...], int]  # where it begins and ends in its text, its ids, the first one's place


class Augmenter:
    """Makes copies of texts.

    Args:
        model: with its masked word head, in evaluation mode. tokenizer: the model's own; it is left as it is.
        copies: of each text.
        share: probability that a word is replaced.
        candidates: words of which one takes its place.
        seed: of everything random; a text's copies depend on it, the text and its number.
    """

    def __init__(
        self, model: PreTrainingModel, tokenizer: Tokenizer, copies: int, share: float, candidates: int, seed: int
    ):
        self.model, self.copies, self.share, self.candidates, self.seed = model, copies, share, candidates, seed
        special = special_ids(tokenizer)
        self.mask, self.unk = special.mask, special.unk
        names = {i: tokenizer.decode([i]).strip() for i in range(min(model.config.vocab_size, vocab_size(tokenizer)))}
        continued = continuations(tokenizer)
        self.words = {i: name for i, name in names.items() if name.isalnum() and not continued[i] and i not in special}
        whole = set(self.words)
        self.others = torch.tensor([i for i in range(model.config.vocab_size) if i not in whole])
        self.whole = torch.tensor(sorted(whole), device=model.word_embeddings.device)
        self.vectors = F.normalize(model.word_embeddings.detach()[self.whole].float(), dim=-1)
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(model.config.longest)
        self.tokenizer.encode_special_tokens = True

    @torch.inference_mode()
    def copies_of(self, texts: Sequence[str], first: int = 0) -> list[list[str]]:
        """Of each text its copies, a line each.

        Args:
            texts: what is beyond the tokens that the model takes stays as it is.
            first: the number of the first one, from 0.
        """
        texts = [" ".join(text.split()) for text in texts]
        encoded = self.tokenizer.encode_batch(texts)
        words = [_words(each, text) for each, text in zip(encoded, texts, strict=True)]
        replaced, chosen = [], []
        for number, some in enumerate(words, first):
            random = np.random.default_rng((self.seed, number))
            replaced.append(random.random((self.copies, len(some))) < self.share)
            chosen.append(random.random((self.copies, len(some))))
        wanted = [(i, j) for i, rows in enumerate(replaced) for j in np.flatnonzero(rows.any(0)).tolist()]
        one = [(i, j) for i, j in wanted if len(words[i][j][2]) == 1 and words[i][j][2] != (self.unk,)]
        sequences = []
        for i, j in one:
            sequences.append(list(encoded[i].ids))
            sequences[-1][words[i][j][3]] = self.mask
        places = [words[i][j][3] for i, j in one]
        rows = likeliest(self.model, sequences, places, self.others, self.candidates + 1)
        found = {key: [token for token, _ in row] for key, row in zip(one, rows, strict=True)}
        several = [(i, j) for i, j in wanted if len(words[i][j][2]) > 1]
        found |= dict(zip(several, self._nearest([words[i][j][2] for i, j in several]), strict=True))
        made = []
        for i, text in enumerate(texts):
            made.append(
                [self._copy(text, i, words[i], found, *rows) for rows in zip(replaced[i], chosen[i], strict=True)]
            )
        return made

    def _copy(
        self, text: str, i: int, words: list[Word], found: dict[tuple[int, int], list[int]], replaced: np.ndarray,
        chosen: np.ndarray,
    ) -> str:  # fmt: skip
        """The text with the words of which `replaced` is true by one of their candidates, at `chosen` from 0 to 1."""
        parts, end = [], 0
        for j, (start, stop, ids, _) in enumerate(words):
            own = text[start:stop].lower()
            ids = [each for each in found.get((i, j), []) if (each,) != ids and self.words[each].lower() != own]
            ids = ids[: self.candidates]
            if replaced[j] and ids:
                parts += [text[end:start], self.words[ids[int(chosen[j] * len(ids))]]]
                end = stop
        return "".join([*parts, text[end:]])

    def _nearest(self, words: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """For each word of several ids the whole words with the nearest vectors, the nearest first."""
        table, nearest = self.model.word_embeddings.detach(), []
        for ids in words:
            mean = F.normalize(table[list(ids)].float().mean(0), dim=0)
            most = min(self.candidates + 1, len(self.whole))
            nearest.append(self.whole[(self.vectors @ mean).topk(most).indices].tolist())
        return nearest


def augmented(folder: Path, augmenter: Augmenter, texts: Sequence[str]) -> bool:
    """Makes the run's file with the copies of these texts, a line each; False where Ctrl-C or SIGTERM stopped it.

    Each 64 texts' copies are written when they are made, and the next call goes on behind them.

    Raises:
        OSError: it cannot be written.
    """
    part, size = folder / PART, augmenter.copies * AT_ONCE
    files.write(folder, {OF: _digest(texts)})
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []
    whole = len(lines) // size
    bar = tqdm(total=len(texts), initial=whole * AT_ONCE, desc="augmenting", unit="text", leave=False)
    with files.naming(part), part.open("ab") as file, stop_signals() as stopped, bar:
        file.truncate(sum(len(line) + 1 for line in lines[: whole * size]))
        for first in range(whole * AT_ONCE, len(texts), AT_ONCE):
            if stopped:
                return False
            some = texts[first : first + AT_ONCE]
            made = augmenter.copies_of(some, first)
            file.writelines(f"{copy}\n".encode() for copies in made for copy in copies)
            file.flush()
            bar.update(len(some))
        os.fsync(file.fileno())
    os.replace(part, folder / MADE)
    return True


def refuse_other_texts(folder: Path, texts: Sequence[str]) -> None:
    """Raises ValueError where the run's folder holds copies, or some of them, of other texts than these."""
    if not any((folder / name).exists() for name in (MADE, PART)):
        return
    of = folder / OF
    if not of.exists() or of.read_bytes() != _digest(texts):
        raise ValueError(
            f"{folder} holds copies of other texts than the labelled ones are now ({OF} has their digest): put the "
            "table back as it was, or start a new run in another --output"
        )


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.sha256(files.json_text(list(texts)).encode()).hexdigest().encode()


def load_augmenter(config: DistillConfig) -> Augmenter:
    """As the settings say.

    Raises:
        FileNotFoundError, ValueError: a folder without a masked word head; a tokenizer without special tokens.
    """
    model = load_masked_lm(config.augment_model, config.device)
    return Augmenter(
        model, load_tokenizer(config.augment_model), config.augment, config.augment_share, config.augment_candidates,
        config.seed,
    )  # fmt: skip


def _words(encoding: Encoding, text: str) -> list[Word]:
    """The words of letters and digits in what was encoded."""
    words: dict[int, list[int]] = {}  # by number, the places of each one's pieces
    for place, word in enumerate(encoding.word_ids):
        if word is not None:
            words.setdefault(word, []).append(place)
    found = []
    if encoding.overflowing:
        words.popitem()  # which may be cut
    for places in words.values():
        start, stop = encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]
        start += len(text[start:stop]) - len(text[start:stop].lstrip())
        if text[start:stop].isalnum():
            found.append((start, stop, tuple(encoding.ids[place] for place in places), places[0]))
    return found
