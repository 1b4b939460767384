"""Samples, next-sentence pairs and packed batches: by hand on small stores, and held together on real text."""

from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastbert.data import (
    PretrainBatches,
    SpecialIds,
    TokenStore,
    special_ids,
    split_sentences,
    train_tokenizer,
    write_store,
)
from fastbert.data.samples import Spans, cut_greedily, draw_next_pairs, find_rows, find_spans

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
V = 60_000


def make_store(documents):
    """A store in memory of documents given as lists of sentence lengths; token i has id 5 + i."""
    lengths = [n for document in documents for n in document]
    return TokenStore(
        Path("memory"),
        np.arange(5, 5 + sum(lengths)).astype(np.uint16),
        np.cumsum([0, *lengths]),
        np.cumsum([0] + [len(document) for document in documents]),
        V,
        "",
    )


def spans(store, limit, **options):
    return [list(s) for s in zip(*(x.tolist() for x in find_spans(store, limit, **options)), strict=True)]


def test_cut_greedily():
    offsets = np.array([0, 3, 5, 9, 20, 21])
    assert cut_greedily(offsets, 5).tolist() == [0, 2, 3, 4, 5]  # 3 + 2, 4, 11 alone though too long, 1
    assert cut_greedily(offsets, 9).tolist() == [0, 3, 4, 5]
    assert cut_greedily(offsets, 100).tolist() == [0, 5]
    assert cut_greedily(offsets, 100, np.array([0, 5, 21])).tolist() == [0, 2, 5]


def test_cut_greedily_over_many_windows(monkeypatch):
    offsets = np.append(0, np.cumsum(np.random.default_rng(0).integers(1, 9, 1000)))
    whole = cut_greedily(offsets, 20)
    monkeypatch.setattr("fastbert.data.samples._WINDOW", 7)
    assert np.array_equal(cut_greedily(offsets, 20), whole)


def test_spans_by_hand():
    store = make_store([[4, 5, 3], [2], [25, 3], [1]])
    assert spans(store, 10) == [
        [0, 9], [9, 12],  # 4 + 5, then 3 alone: 12 is too much
        [12, 14],
        [14, 24], [24, 34], [34, 42],  # 25 is cut in 10, 10, 5, and the 5 goes on with 3
        [42, 43],
    ]  # fmt: skip
    assert spans(store, 10, shortest=2) == spans(store, 10)[:-1]
    assert spans(store, 100) == [[0, 12], [12, 14], [14, 42], [42, 43]]


def test_rows_by_hand():
    """Rows of 10 tokens, 2 of them special for every document: 4 + 4, then 3 and 2 + 1 of the next document."""
    sequences, rows = find_rows(make_store([[4, 4, 3], [2, 1], [1], [9]]), 10, extra=2)
    assert [x.tolist() for x in sequences] == [[0, 8, 11, 14, 15, 23], [8, 11, 14, 15, 23, 24]]
    assert rows.tolist() == [0, 1, 3, 4, 5, 6]  # 3 + 2 and 3 + 2 are full; 1 is alone, for 9 is cut in 8 and 1
    assert find_rows(make_store([[3], [1], [2]]), 12, extra=2)[1].tolist() == [0, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(8, 40))
def test_rows_hold_all_text_and_are_full(documents, seq_len):
    store = make_store(documents)
    sequences, rows = find_rows(store, seq_len, extra=2)
    assert sequences.starts[0] == 0 and sequences.ends[-1] == store.sentences[-1]
    assert (sequences.starts[1:] == sequences.ends[:-1]).all()
    ends = store.sentences[store.documents[1:]]
    assert set(ends) <= set(sequences.ends), "a sequence goes on into another document"
    full = np.add.reduceat(sequences.ends - sequences.starts + 2, rows[:-1])
    assert full.max() <= seq_len and rows[-1] == len(sequences.starts)
    for row, end in zip(full[:-1], sequences.ends[rows[1:-1] - 1], strict=True):
        sentence = np.searchsorted(store.sentences, end, "right")  # the end of the one that comes next
        following = store.sentences[sentence] - end
        special = 2 * (end in ends)
        assert row + min(following, seq_len - 2) + special > seq_len, "the next sentence would have fitted"


def pairs(store, a_spans, seeds):
    """Pairs of every span under many seeds: (A start, cut, B start, B length, label)."""
    starts, ends = np.array(a_spans).T
    for seed in seeds:
        p = draw_next_pairs(store, Spans(starts, ends), np.arange(len(starts)), seed, 0)
        assert p.labels.dtype == np.int64
        for (a, b), (n, m), label in zip(p.starts.tolist(), p.lengths.tolist(), p.labels.tolist(), strict=True):
            yield a, a + n, b, m, label


def test_pairs_by_hand():
    """Document 0 is tokens 0..11 in sentences of 4, 5, 3; document 1 has 2 + 2 + 8, tokens 12..23."""
    store = make_store([[4, 5, 3], [2, 2, 8]])
    following, random = set(), set()
    for a, cut, b, m, label in pairs(store, [[0, 12]], range(400)):
        assert a == 0
        (random if label else following).add((cut, b, m))
    assert following == {(4, 4, 8), (9, 9, 3)}
    # Room for 8: from the first sentence 2 + 2 fit, from the second (moved not at all, 10 are left) 2, the third has 8.
    # Room for 3: 2 of 2 + 2, 2, or 3 of the sentence of 8.
    assert random == {(4, 12, 4), (4, 14, 2), (4, 16, 8), (9, 12, 2), (9, 14, 2), (9, 16, 3)}


def test_random_segment_moves_forward_to_fill_its_room():
    """Another document of ten sentences of 2 tokens: room for 8 leaves starts 0, 2, ... 12, never the last three."""
    store = make_store([[4, 8], [2] * 10])
    found = {(b - 12, m) for _, _, b, m, label in pairs(store, [[0, 12]], range(400)) if label}
    assert found == {(start, 8) for start in range(0, 14, 2)}


def test_single_sentence_is_cut_at_any_token():
    store = make_store([[4], [1]])
    found = {pair[1:] for pair in pairs(store, [[0, 4]], range(200))}
    assert {p[:3] for p in found if p[3] == 0} == {(1, 1, 3), (2, 2, 2), (3, 3, 1)}
    assert {p[1:] for p in found if p[3] == 1} == {(4, 1, 1)}


def test_random_segments_come_from_other_documents_by_length():
    store = make_store([[2] * 10, [2] * 30, [2] * 60, [2] * 20])
    drawn = np.zeros(4)
    labels = []
    for _, _, b, _, label in pairs(store, [[20, 40]] * 100, range(40)):
        labels.append(label)
        drawn[np.searchsorted([20, 80, 200], b, "right")] += label
    assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert drawn[1] == 0
    shares = np.array([10, 60, 20]) / 90
    deviation = np.sqrt(shares * (1 - shares) / drawn.sum())
    assert (np.abs(drawn[[0, 2, 3]] / drawn.sum() - shares) < 5 * deviation).all()


# ---- batches on real text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(topics.values(), 1024)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data") / "store"
    write_store(folder, [split_sentences(text) for _, text in sorted(topics.items())], tokenizer, progress=False)
    return TokenStore.open(folder)


def make(store, tokenizer, **options):
    options = {"seq_len": 64, "batch_tokens": 1024, "seed": 5, **options}
    return PretrainBatches(store, special_ids(tokenizer), **options)


def unmasked(batch):
    ids = batch.input_ids.clone()
    ids[batch.masked_positions] = batch.labels
    return ids


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_form_of_a_batch(store, tokenizer, objective):
    batches, pairs = make(store, tokenizer, objective=objective), objective != "mlm"
    total = 0
    for batch in map(batches.__getitem__, range(len(batches))):
        cu = batch.cu_seqlens.long()
        lengths = cu.diff()
        assert batch.cu_seqlens.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(batch.input_ids) <= 1024
        assert batch.max_seqlen == lengths.max() <= 64
        ids = unmasked(batch)
        assert (ids[cu[:-1]] == 2).all() and (ids[cu[1:] - 1] == 3).all()
        assert (ids == 2).sum() == len(lengths) and (ids == 3).sum() == len(lengths) * (2 if pairs else 1)
        for a, b in pairwise(cu.tolist()):
            assert batch.position_ids[a:b].tolist() == list(range(b - a))
            # The second segment begins after the first [SEP].
            after = (ids[a:b] == 3).cumsum(0) - (ids[a:b] == 3).long()
            assert torch.equal(batch.token_type_ids[a:b], after)
        assert (batch.sentence_label is None) is not pairs
        if pairs:
            assert batch.sentence_label.shape == lengths.shape
        for x in (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.masked_positions, batch.labels):
            assert x.dtype == torch.int64
        total += len(lengths)
    assert total == len(batches.spans.starts)


def test_an_epoch_without_pairs_is_the_corpus(store, tokenizer):
    """Every token exactly once, beside the special ones; and batches as full as they can be."""
    batches = make(store, tokenizer, objective="mlm")
    counts = torch.zeros(store.vocab_size, dtype=torch.int64)
    sizes, firsts = [], []
    for batch in map(batches.__getitem__, range(len(batches))):
        counts += torch.bincount(unmasked(batch), minlength=store.vocab_size)
        sizes.append(len(batch.input_ids))
        firsts.append(int(batch.cu_seqlens[1]))
    counts[[2, 3]] = 0
    assert np.array_equal(counts, store.token_counts())
    assert all(size + following > 1024 for size, following in zip(sizes, firsts[1:], strict=False))


@pytest.mark.parametrize("static", [False, True])
def test_rows_and_next_tokens_in_batches(store, tokenizer, static):
    """A batch of rows: every sequence is text of one document; of the language model every next token is a label."""
    batches = make(store, tokenizer, objective="clm", inputs="full-sentences", static=static)
    counts = torch.zeros(store.vocab_size, dtype=torch.int64)
    documents, text = store.sentences[store.documents], store.tokens.astype(np.int64)
    found = torch.zeros(len(text), dtype=torch.int64)
    where = {tuple(text[a:b]): a for a, b in zip(batches.spans.starts, batches.spans.ends, strict=True)}
    for batch in map(batches.__getitem__, range(len(batches))):
        ids, real = batch.input_ids, batch.labels != -100
        assert torch.equal(ids[batch.masked_positions[real] + 1], batch.labels[real]) and batch.sentence_label is None
        counts += torch.bincount(batch.labels[real], minlength=store.vocab_size)
        bounds = batch.cu_seqlens[batch.cu_seqlens <= batch.filled_tokens].tolist()
        for a, b in pairwise(dict.fromkeys(bounds)):
            assert ids[a] == 2 and ids[b - 1] == 3 and batch.position_ids[a:b].tolist() == list(range(b - a))
            start = where[tuple(ids[a + 1 : b - 1].tolist())]
            assert np.searchsorted(documents, start, "right") == np.searchsorted(documents, start + b - a - 2, "left")
            found[start] += 1
    assert torch.equal(counts, torch.from_numpy(store.token_counts()).index_fill(0, torch.arange(5), 0)), (
        "every token is predicted once"
    )
    assert found.sum() == len(batches.spans.starts)


def test_pairs_in_batches_are_text(store, tokenizer):
    """Without [CLS] and [SEP] a kept pair stands in the store as it is, a replaced one does not."""
    text = store.tokens.astype(np.uint16).tobytes()
    found = [[], []]
    batches = make(store, tokenizer)
    for batch in map(batches.__getitem__, range(20)):
        ids, cu = unmasked(batch), batch.cu_seqlens.tolist()
        for b, label in enumerate(batch.sentence_label.tolist()):
            sample = ids[cu[b] : cu[b + 1]].numpy()
            found[label].append(sample[(sample != 2) & (sample != 3)].astype(np.uint16).tobytes() in text)
    assert len(found[0]) > 100 and all(found[0])
    assert len(found[1]) > 100 and np.mean(found[1]) < 0.05


def test_epochs_differ_and_repeat(store, tokenizer):
    first = make(store, tokenizer)
    second = first.at_epoch(1)
    assert not torch.equal(first[0].input_ids, second[0].input_ids)
    orders = [batches._block(0)[0] for batches in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(first.count))
    assert same(second[3], make(store, tokenizer, epoch=1)[3])
    assert same(second.at_epoch(0)[3], first[3])
    assert not same(make(store, tokenizer, seed=6)[0], first[0])


def test_a_sample_is_the_same_in_any_batch(store, tokenizer):
    def samples(batch_tokens):
        batches = make(store, tokenizer, batch_tokens=batch_tokens)
        for batch in map(batches.__getitem__, range(len(batches))):
            lengths = batch.cu_seqlens.diff().tolist()
            yield from zip(batch.input_ids.split(lengths), batch.sentence_label.tolist(), strict=True)

    alone, together = list(samples(64)), list(samples(1024))
    assert len(alone) == len(together) > 1000
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(alone, together, strict=True))


ROWS = {"objective": "mlm", "inputs": "full-sentences", "unit": "span"}


@pytest.mark.parametrize(("workers", "options"), [(1, {}), (2, {"static": True}), (7, ROWS)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create [27] worker")  # more than there are cores
def test_workers_and_starting_point_change_nothing(store, tokenizer, workers, options):
    batches = make(store, tokenizer, **options)
    loader = DataLoader(batches, batch_size=None, sampler=range(3, 12), num_workers=workers)
    loaded = list(loader)
    assert len(loaded) == 9
    for i, batch in enumerate(loaded, 3):
        assert type(batch) is type(batches[i])
        assert same(batch, batches[i])


@pytest.mark.parametrize("options", [{"objective": "mlm"}, {"objective": "mlm", "static": True}, ROWS])
def test_an_epoch_of_many_blocks_has_every_token_once(store, tokenizer, options, monkeypatch):
    """Of an epoch longer than 65,536 samples; the first batches again after the last ones are the same."""
    monkeypatch.setattr("fastbert.data.batches.BLOCK", 90)
    batches, counts = make(store, tokenizer, **options), np.zeros(store.vocab_size, np.int64)
    first = batches[0]
    for i in batches.numbers():
        batch = batches[i]
        ids = batch.input_ids.clone()
        real = batch.labels >= 0
        ids[batch.masked_positions[real]] = batch.labels[real]
        counts += np.bincount(ids[: batch.filled_tokens], minlength=store.vocab_size)
        assert len(batches.blocks) <= 4
    assert i + 1 == len(batches) and len(batches.ends) - 1 == -(-batches.count // 90) > 5
    special = counts[[2, 3]]
    counts[[2, 3]] = 0
    assert np.array_equal(counts, store.token_counts()) and special[0] == special[1] > 0
    assert 0 not in batches.blocks and same(batches[0], first)
    middle = batches.ends[2]
    assert list(make(store, tokenizer, **options).numbers(middle)) == [*range(middle, len(batches))]
    with pytest.raises(IndexError, match=f"expected 0 <= i < {len(batches)}"):
        batches[len(batches)]


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_static_batches_have_one_shape_and_the_same_samples(store, tokenizer, objective):
    """Each sample once, with the masks that it has in any other batch; what is empty counts nowhere."""
    options = {"objective": objective, "batch_tokens": 1000}
    static, usual = make(store, tokenizer, static=True, **options), make(store, tokenizer, **options)

    def samples(batch):
        cu, where = batch.cu_seqlens.tolist(), batch.masked_positions
        for b, (start, end) in enumerate(pairwise(cu)):
            if start < end <= batch.filled_tokens:
                own = batch.masked_positions[(where >= start) & (where < end) & (batch.labels >= 0)] - start
                label = None if batch.sentence_label is None else int(batch.sentence_label[b])
                fields = batch.input_ids, batch.token_type_ids, batch.position_ids
                yield *(tuple(x[start:end].tolist()) for x in fields), tuple(own.tolist()), label

    batches, others = static.at_epoch(3), usual.at_epoch(3)
    assert len(static[0].input_ids) == static.shape.tokens == batches.shape.tokens
    found, empty = [], 0
    for batch in map(batches.__getitem__, range(len(batches))):
        tokens, sequences, predictions = batches.shape
        assert 936 < tokens == len(batch.input_ids) == len(batch.token_type_ids) == len(batch.position_ids)
        assert len(batch.cu_seqlens) == sequences + 1 and len(batch.labels) == predictions
        lengths, count = batch.cu_seqlens.diff(), int((batch.labels != -100).sum())
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == tokens
        assert lengths.min() >= 0 and lengths.max() <= batch.max_seqlen == 64
        assert (batch.labels[count:] == -100).all() and (batch.masked_positions[count:] == 0).all()
        assert (batch.masked_positions[:count] < batch.filled_tokens).all()
        assert (batch.input_ids[batch.filled_tokens :] == 0).all()
        if batch.sentence_label is not None:
            real = (batch.cu_seqlens[1:] <= batch.filled_tokens) & (lengths > 0)
            assert torch.equal(batch.sentence_label != -100, real)
        found += samples(batch)
        empty += tokens - batch.filled_tokens
    assert empty / (tokens * len(batches)) == pytest.approx(batches.empty_share) and batches.empty_share < 0.02
    expected = [sample for i in range(len(others)) for sample in samples(others[i])]
    assert len(found) == len(expected) and set(found) == set(expected)


def test_to_device(store, tokenizer):
    batch = make(store, tokenizer, objective="mlm")[0].to("meta")
    assert batch.input_ids.device.type == batch.cu_seqlens.device.type == "meta"
    assert isinstance(batch.max_seqlen, int) and batch.sentence_label is None


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
@pytest.mark.parametrize("seq_len", [8, 9, 512])
def test_extreme_lengths(store, tokenizer, objective, seq_len):
    batches = make(store, tokenizer, seq_len=seq_len, batch_tokens=seq_len, objective=objective)
    assert max(batches[i].max_seqlen for i in range(50)) <= seq_len


def test_one_sentence_documents():
    batches = PretrainBatches(make_store([[3], [2], [1], [1]]), SPECIAL, seq_len=8, batch_tokens=64, seed=0)
    assert len(batches) == 1
    batch = batches[0]
    assert batch.cu_seqlens.diff().sort().values.tolist()[-1] <= 6 and len(batch.sentence_label) == 2
    without = PretrainBatches(make_store([[1]]), SPECIAL, seq_len=8, batch_tokens=8, seed=0, objective="mlm")
    assert unmasked(without[0]).tolist() == [2, 5, 3] and without[0].labels.tolist() == [5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 7}, "expected 8 <= seq_len <= 65536, got 7"),
        ({"seq_len": 100_000}, "got 100000"),
        ({"batch_tokens": 63}, "expected >= seq_len = 64, got 63"),
        ({"mask_prob": 0.0}, "0 < mask_prob < 1, got 0.0"),
        ({"mask_prob": float("nan")}, "got nan"),
        ({"mask_share": 0.95}, "sum <= 1, got 0.95 and 0.1"),
        ({"random_share": -0.1}, "got 0.8 and -0.1"),
        ({"objective": "sop"}, r"one of mlm, mlm\+nsp, mlm\+sop, clm, plm, bilm, got 'sop'"),
        ({"inputs": "sentences"}, "one of doc-sentences, full-sentences, got 'sentences'"),
        ({"inputs": "full-sentences"}, r"no pairs of texts: expected objective mlm, clm or bilm, got 'mlm\+nsp'"),
        ({"unit": "token"}, "one of word, ngram, span, got 'token'"),
        ({"continues": np.zeros(3, bool)}, r"bool \[\d+\], a flag for every id .* got bool \[3\]"),
        ({"epoch": -1}, "counted from 0 .* got -1"),
    ],
)
def test_bad_settings(store, tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        make(store, tokenizer, **options)


def test_bad_stores(store, tokenizer):
    settings = {"seq_len": 64, "batch_tokens": 64, "seed": 0}
    with pytest.raises(ValueError, match=r"only one: separate the documents .*--objective mlm"):
        PretrainBatches(make_store([[5, 5]]), SPECIAL, **settings)
    with pytest.raises(ValueError, match=r"two tokens .*--objective mlm"):
        PretrainBatches(make_store([[1], [1]]), SPECIAL, **settings)
    with pytest.raises(ValueError, match=rf"special id 1024 is outside the store's vocabulary of {store.vocab_size}"):
        PretrainBatches(store, SpecialIds(0, 1, 2, 3, 1024), **settings)
    batches = make(store, tokenizer)
    with pytest.raises(IndexError, match="expected 0 <= i"):
        batches[len(batches)]
