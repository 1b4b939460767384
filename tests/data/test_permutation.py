"""Orders in which words are predicted: by hand, by their properties, and in batches of real text."""

import itertools
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from fastbert.data import PretrainBatches, TokenStore, special_ids, split_sentences, train_tokenizer, write_store
from fastbert.data.masking import budget
from fastbert.data.permutation import SHARE, permute
from fastbert.models.two_streams import UNSEEN

SAMPLES = np.array([7, 3, 9])
BOUNDS, TARGETS = np.array([0, 5, 7, 13]), np.array([1, 2, 8, 10, 12])  # of the second sample nothing is predicted


def numbers(made):
    """Of each sample the numbers of its queries in the order, by the ranks that they see."""
    starts = np.searchsorted(made.queries, made.cu_seqlens)
    return [(made.query_ranks[made.queries[a:b]] + 1).tolist() for a, b in itertools.pairwise(starts)]


def test_queries_stand_behind_their_sample_s_tokens():
    made = permute(BOUNDS, TARGETS, SAMPLES, seed=0, epoch=0)
    assert made.cu_seqlens.tolist() == [0, 7, 9, 18]
    assert made.queries.tolist() == [5, 6, 15, 16, 17]
    assert made.source.tolist() == [0, 1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 8, 10, 12]
    assert [sorted(each) for each in numbers(made)] == [[0, 1], [], [0, 1, 2]]
    (a, b), _, (c, d, e) = numbers(made)
    assert made.key_ranks.tolist() == [-1, a, b, -1, -1, UNSEEN, UNSEEN, -1, -1, -1, c, -1, d, -1, e, *[UNSEEN] * 3]
    content = made.key_ranks != UNSEEN
    assert np.array_equal(made.query_ranks[content], made.key_ranks[content]), "a token sees itself"


def test_an_order_is_the_sample_s_own():
    """It does not depend on the neighbours in the batch; it does on seed and epoch; every order is as likely."""
    alone = permute(np.array([0, 6]), TARGETS[2:] - 7, SAMPLES[2:], seed=5, epoch=2)
    together = permute(BOUNDS, TARGETS, SAMPLES, seed=5, epoch=2)
    assert numbers(alone)[0] == numbers(together)[2]
    many = 6000
    bounds = np.arange(many + 1) * 3
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        made = permute(bounds, np.arange(3 * many), np.arange(many), seed=seed, epoch=epoch)
        rows, counts = np.unique(np.array(numbers(made)), axis=0, return_counts=True)
        assert len(rows) == 6 and abs(counts / many - 1 / 6).max() < 0.02
        if (seed, epoch) == (0, 0):
            first = numbers(made)
        else:
            assert np.mean([a == b for a, b in zip(first, numbers(made), strict=True)]) < 0.2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    texts = list(topics.values())[:10]
    tokenizer = train_tokenizer(texts, 300)
    documents = [split_sentences(text) for text in texts]
    folder = tmp_path_factory.mktemp("data") / "store"
    write_store(folder, documents, tokenizer, progress=False)
    return TokenStore.open(folder), special_ids(tokenizer)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_batches_hold_the_text_itself_and_its_queries(made, unit):
    store, special = made
    options = {"seq_len": 32, "batch_tokens": 300, "seed": 4, "objective": "plm", "mask_prob": SHARE, "unit": unit}
    flexible = PretrainBatches(store, special, **options)
    static = PretrainBatches(store, special, **options, static=True)
    assert flexible.longest == static.longest == 32 + budget(np.array(30), SHARE) == 37
    samples = [{}, {}]
    for found, batches in zip(samples, (flexible, static), strict=True):
        for i in range(len(batches)):
            batch = batches[i]
            assert batches.shape is None or batch.max_seqlen == 37
            assert batches.shape is None or (len(batch.input_ids), len(batch.cu_seqlens) - 1) == batches.shape[:2]
            assert batch.filled_tokens <= len(batch.input_ids) <= 300
            real = batch.labels != -100
            queries, labels = batch.masked_positions[real], batch.labels[real]
            assert torch.equal(queries, (batch.key_ranks == UNSEEN).nonzero().squeeze(1))
            bounds = batch.cu_seqlens.long()
            own = torch.searchsorted(bounds, queries, right=True) - 1
            aimed = bounds[own] + batch.position_ids[queries]  # the token that a query predicts
            assert torch.equal(batch.input_ids[aimed], labels) and not np.isin(labels, special).any()
            assert torch.equal(batch.key_ranks[aimed], batch.query_ranks[queries] + 1)
            assert torch.equal(batch.token_type_ids[aimed], batch.token_type_ids[queries])
            for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                ids, ranks = batch.input_ids[start:end], batch.key_ranks[start:end]
                content = ids[ranks != UNSEEN].tolist()
                if content and content[0] == special.cls:
                    count = (ranks == UNSEEN).sum().item()
                    assert len(content) <= 32 and count <= budget(np.array(len(content) - 2), SHARE)
                    assert unit == "span" or count == budget(np.array(len(content) - 2), SHARE)
                    found[tuple(content)] = batch.query_ranks[start:end].tolist()
    assert samples[0] == samples[1] and len(samples[0]) > 20


def test_a_batch_must_hold_a_sample_with_its_queries(made):
    with pytest.raises(ValueError, match="expected >= seq_len = 32 and 5 queries, got 36"):
        PretrainBatches(*made, seq_len=32, batch_tokens=36, seed=0, objective="plm", mask_prob=SHARE)
    with pytest.raises(ValueError, match="expected objective mlm, clm or bilm, got 'plm'"):
        PretrainBatches(*made, seq_len=32, batch_tokens=64, seed=0, objective="plm", inputs="full-sentences")
