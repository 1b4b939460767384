"""Sentence-order pairs and n-gram masks: by hand, and beside a second, slower telling of the same rules."""

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import PretrainBatches, SpecialIds, TokenStore, continuations, mask_tokens, train_tokenizer
from fastbert.data.draws import Purpose, draw
from fastbert.data.samples import Spans, draw_ordered_pairs

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
V = 1000
PIECES = np.arange(V) % 3 == 2  # ids 2, 5, 8, ... continue a word


def store(*documents):
    """Documents given as lists of sentence lengths; token i has id 5 + i."""
    lengths = [n for document in documents for n in document]
    return TokenStore(
        Path("memory"),
        np.arange(5, 5 + sum(lengths)).astype(np.uint16),
        np.cumsum([0, *lengths]),
        np.cumsum([0] + [len(document) for document in documents]),
        V,
        "",
    )


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "cuts"), [([4, 5, 3], {4, 9}), ([4], {1, 2, 3})])
def test_neighbours_are_swapped_half_of_the_time(document, cuts):
    """At sentence boundaries, a single sentence at any token; label 0 in order, 1 swapped; one document is enough."""
    end, counts = sum(document), np.zeros(2)
    seen = {0: set(), 1: set()}
    for seed in range(400):
        p = draw_ordered_pairs(store(document), Spans(np.array([0]), np.array([end])), np.array([0]), seed, 0)
        (a, b), (n, m), label = p.starts[0].tolist(), p.lengths[0].tolist(), int(p.labels[0])
        first, second = ((b, m), (a, n)) if label else ((a, n), (b, m))
        assert first[0] == 0 and first[1] == second[0] and sum(second) == end, "two neighbours that are all there is"
        seen[label].add(second[0])
        counts[label] += 1
    assert seen[0] == seen[1] == cuts
    assert abs(counts[1] / 400 - 0.5) < 5 * 0.5 / 20


def test_a_swapped_pair_in_a_batch_is_the_text_in_another_order():
    settings = {"seq_len": 16, "batch_tokens": 32, "seed": 1, "mask_share": 0, "random_share": 0}
    batches = PretrainBatches(store([3, 4], [6]), SPECIAL, objective="mlm+sop", **settings)
    labels = set()
    for epoch in range(8):
        batch = batches.at_epoch(epoch)[0]
        assert batch.sentence_label.shape == (2,)
        spans = pairwise(batch.cu_seqlens.tolist())
        for (start, end), label in zip(spans, batch.sentence_label.tolist(), strict=True):
            ids, types = batch.input_ids[start:end].tolist(), batch.token_type_ids[start:end].tolist()
            cut = ids.index(3) + 1
            assert ids[0] == 2 and ids[-1] == 3 and types == [0] * cut + [1] * (len(ids) - cut)
            texts = [ids[1 : cut - 1], ids[cut:-1]]
            a, b = reversed(texts) if label else texts
            assert a + b in ([*range(5, 12)], [*range(12, 18)])
            labels.add(label)
    assert labels == {0, 1}


# --- masks -----------------------------------------------------------------------------------------------------------


def pack(*contents):
    samples = [[SPECIAL.cls, *content, SPECIAL.sep] for content in contents]
    return np.concatenate(samples), np.cumsum([0] + [len(s) for s in samples])


def chosen(ids, cu, samples, **options):
    options = {"seed": 7, "epoch": 0, "continued": PIECES[ids], "unit": "ngram"} | options
    return mask_tokens(ids, cu, np.asarray(samples), SPECIAL, V, **options)[1]


WEIGHTS = {"word": [1], "ngram": [1, 1 / 2, 1 / 3], "span": [0.2 * 0.8**n for n in range(10)]}


def rules(ids, sample, share, unit, seed=7):
    """Which places are chosen, told word by word: what the program for ALBERT's data does with the same draws."""
    weights = WEIGHTS[unit]
    keys, _, _, lengths = draw(Purpose.MASK, seed, 0, np.full(len(ids), sample), np.arange(len(ids)))
    words, runs = [], []
    for place, token in enumerate(ids.tolist()):
        if token in SPECIAL:
            runs.append([])
        elif PIECES[token] and runs[-1]:
            words[-1].append(place)
        else:
            words.append([place])
            runs[-1].append(words[-1])
    left, taken = max(1, round(sum(map(len, words)) * share)), set()
    ngrams = {w[0]: [list(chain(*run[i : i + n])) for n in range(1, 11)] for run in runs for i, w in enumerate(run)}
    for start in sorted(ngrams, key=lambda place: keys[place]):
        drawn = lengths[start] / 2**32 * sum(weights)
        n = 1 + sum(drawn >= sum(weights[: i + 1]) for i in range(len(weights) - 1))
        for places in reversed(ngrams[start][:n]):
            if len(places) <= left:
                if not taken.intersection(places):
                    taken.update(places)
                    left -= len(places)
                break
    return sorted(taken)


@pytest.mark.parametrize("unit", WEIGHTS)
def test_units_of_words_follow_the_rules(unit):
    rng = np.random.default_rng(0)
    contents = [rng.integers(3 if n == 40 else 5, V, n) for n in (1, 2, 3, 40, 100, 300)]
    contents[3][[7, 20]] = SPECIAL.unk, SPECIAL.sep
    ids, cu = pack(*contents)
    for share in (0.15, 0.5, 0.9):
        positions = chosen(ids, cu, range(6), mask_prob=share, unit=unit)
        assert (np.diff(positions) > 0).all()
        for sample, content in enumerate(contents):
            own = positions[(positions >= cu[sample]) & (positions < cu[sample + 1])] - cu[sample]
            assert own.tolist() == rules(pack(content)[0], sample, share, unit), (share, len(content))


def test_lengths_of_ngrams_have_weights_one_half_and_a_third():
    """A sample of 40 words of one piece has 2 to choose: the first n-gram shows what was drawn, at most two words."""
    ids, cu = pack(*[np.full(40, 6)] * 4000)
    positions = chosen(ids, cu, range(4000), mask_prob=2 / 40).reshape(4000, 2)
    neighbours = (np.diff(positions, axis=1) == 1).mean()
    share = 5 / 11 * 39 / 40 + 6 / 11 * 2 / 40  # two or three words drawn, not at the end; or one, the next beside it
    assert abs(neighbours - share) < 5 * np.sqrt(share * (1 - share) / 4000)


def test_whole_words_alone_and_never_more_than_wanted():
    ids, cu = pack([6, 8, 8, 8], [6, 8, 6, 8, 6, 8, 6, 8, 6, 8])
    for seed in range(50):
        positions = chosen(ids, cu, [0, 1], seed=seed, mask_prob=0.2)
        assert len(positions) == 2 and positions[0] % 2 == 1 and positions[1] == positions[0] + 1, (
            "of the second sample"
        )


def test_continuations_of_word_pieces():
    tokenizer = train_tokenizer(["unhappy unhappily happy happily happiness"] * 3, 64)
    continues = continuations(tokenizer)
    assert {tokenizer.id_to_token(i) for i in np.flatnonzero(continues)} == {
        t for t in tokenizer.get_vocab() if t[0] == "#"
    }
    assert len(continues) == tokenizer.get_vocab_size() and 0 < continues.sum() < len(continues)
