"""Words that a store knows beside the vocabulary's pieces: from text to masked batches."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader

from fastbert.data import (
    PretrainBatches,
    TokenStore,
    Words,
    continuations,
    special_ids,
    train_byte_bpe,
    train_tokenizer,
    train_unigram,
    write_store,
)
from fastbert.data.words import cut_at_spaces

TEXTS = ["诸葛亮说明天下雨，我们在 New York 等他。", "孔明COVID19乃隆中人", "二〇〇八年诸葛亮·兮"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 200)


def words_of(words, tokenizer, text):
    """The text cut where tokens begin a word."""
    (ids,), continued = words.finder(tokenizer).encode([text])
    offsets = [start for start, _ in tokenizer.encode(words.plain(text), add_special_tokens=False).offsets]
    assert len(ids) == len(continued)
    starts = [start for start, within in zip(offsets, continued, strict=True) if not within]
    return [words.plain(text)[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_jiebas_words_and_the_dictionarys(tokenizer):
    """jieba reads 说明 in it; a word of the list is found in the text, and what it cuts off is a word too."""
    jieba = Words("jieba")
    assert words_of(jieba, tokenizer, TEXTS[0]) == "诸葛亮 说 明天 下雨 ， 我们 在 New York 等 他 。".split()  # noqa: SIM905
    listed = Words("jieba", ("诸葛", "天下", "New York"))
    expected = ["诸葛", "亮", "说", "明", "天下", "雨", "，", "我们", "在", "New York", "等", "他", "。"]
    assert words_of(listed, tokenizer, TEXTS[0]) == expected
    assert words_of(Words("jieba", ("二〇〇八", "亮·兮")), tokenizer, TEXTS[2]) == ["二〇〇八", "年", "诸葛", "亮·兮"]


def test_a_dictionary_alone_leaves_the_vocabularys_words(tokenizer):
    words = Words(None, ("孔明", "隆中人"))
    assert words_of(words, tokenizer, TEXTS[1]) == ["孔明", "COVID19", "乃", "隆中人"]


def test_words_that_stand_apart(tokenizer):
    spaces = Words("spaces")
    text = " 诸葛亮  说 New York 好 ， １９９８年 at 3 pm"
    assert spaces.plain(text) == "诸葛亮说New York好，１９９８年at 3 pm"
    assert words_of(spaces, tokenizer, text) == "诸葛亮 说 New York 好 ， １９９８年 at 3 pm".split()  # noqa: SIM905
    assert cut_at_spaces("  ") == []
    assert words_of(Words("spaces", ("亮说",)), tokenizer, text)[:3] == ["诸葛", "亮说", "New"]


@pytest.mark.parametrize("kind", [train_byte_bpe, train_unigram])
def test_tokens_of_bytes_and_of_several_characters(kind):
    """Bytes of one character stay together; a piece that begins within a word goes on with it."""
    tokenizer = kind(TEXTS * 9, 300)
    words = Words("spaces")
    text = "诸葛亮 说 明天 下雨 䴙䴘 ，"
    (ids,), continued = words.finder(tokenizer).encode([text])
    offsets = tokenizer.encode(words.plain(text), add_special_tokens=False).offsets
    begins = {0, 3, 4, 6, 8, 10}
    seen, expected = set(), []
    for start, _ in offsets:
        expected.append(start not in begins or start in seen)
        seen.add(start)
    assert continued.tolist() == expected and len(ids) == len(offsets)
    assert kind is train_unigram or len(offsets) > len(words.plain(text)), "䴙䴘 are bytes"


def test_a_store_knows_its_words(tokenizer, tmp_path):
    """Its tokens carry them; the ids, the counts and, for maskings of tokens, the batches are those without."""
    documents = [[text] * 8 for text in TEXTS]
    words = Words("jieba", ("诸葛",))
    write_store(tmp_path / "words", documents, tokenizer, words=words, progress=False)
    write_store(tmp_path / "none", documents, tokenizer, progress=False)
    store, none = TokenStore.open(tmp_path / "words"), TokenStore.open(tmp_path / "none")
    ids, continued = store.ids_and_words(store.tokens)
    assert np.array_equal(ids, none.tokens) and ids.dtype == none.tokens.dtype and none.ids_and_words(ids)[1] is None
    assert np.array_equal(continued, np.concatenate([words.finder(tokenizer).encode(d)[1] for d in documents]))
    assert (store.token_counts() == none.token_counts()).all() and store.fingerprint != none.fingerprint
    assert [len(sentence) for sentence in store.document(2)] == [len(sentence) for sentence in none.document(2)]
    store.check_words(words)
    for other in (None, Words("jieba"), Words("spaces", ("诸葛",))):
        with pytest.raises(ValueError, match=r"written with other words .* than these: use those, or delete"):
            store.check_words(other)

    settings = {"seq_len": 64, "batch_tokens": 256, "seed": 0, "objective": "mlm", "mask_prob": 0.4}
    known = continuations(tokenizer)
    for plain, other in zip(
        *(PretrainBatches(s, special_ids(tokenizer), **settings) for s in (store, none)), strict=True
    ):
        assert (plain.input_ids == other.input_ids).all() and (plain.labels == other.labels).all()
    for batch in PretrainBatches(store, special_ids(tokenizer), continues=known, **settings):
        chosen = np.zeros(len(batch.input_ids), bool)
        chosen[batch.masked_positions] = True
        original = batch.input_ids.clone()
        original[batch.masked_positions] = batch.labels
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            text = original[start + 1 : end - 1].numpy()
            places = [i for i in range(len(ids) - len(text) + 1) if np.array_equal(ids[i : i + len(text)], text)]
            within = continued[places[0] : places[0] + len(text)].copy()
            within &= np.append(False, ~np.isin(text, special_ids(tokenizer))[:-1]) & ~np.isin(
                text, special_ids(tokenizer)
            )
            inside = chosen[start + 1 : end - 1]
            assert (inside[1:] == inside[:-1])[within[1:]].all() and inside.any()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_processes_mask_alike(tokenizer, tmp_path):
    """Batch i is a function of its number: of 1, 2 and 7 workers, of one process, and of two that share the batches."""
    words = Words("spaces", ("诸葛亮说",))
    write_store(tmp_path / "store", [["诸葛 亮 说 明天 下雨", *TEXTS]] * 40, tokenizer, words=words, progress=False)
    store = TokenStore.open(tmp_path / "store")
    batches = PretrainBatches(
        store, special_ids(tokenizer), seq_len=24, batch_tokens=48, seed=3, epoch=2, objective="mlm+sop", unit="span",
        continues=continuations(tokenizer), task_type=1,
    )  # fmt: skip
    expected = [batches[i] for i in range(len(batches))]
    assert len(expected) > 14 and (expected[0].task_type_ids == 1).all()
    for rank, processes, workers in ((0, 1, 1), (0, 1, 7), (0, 2, 2), (1, 2, 2)):
        numbers = range(rank, len(batches), processes)
        loader = DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers)
        for i, batch in zip(numbers, loader, strict=True):
            for name, x in batch._asdict().items():
                other = getattr(expected[i], name)
                assert torch.equal(x, other) if torch.is_tensor(x) else x == other, (i, name)


def test_what_does_not_hold(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="no word of the dictionary has several characters"):
        Words(None, ("亮",)).check()
    monkeypatch.setattr("fastbert.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need jieba, ahocorasick_rs: pip install '\.\[chinese\]'"):
        Words("jieba", ("诸葛",)).finder(tokenizer)


def test_a_tokenizer_without_a_normalizer():
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abAB"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert words_of(Words(None, ("ab",)), tokenizer, "ab b ab")[0] == "ab"
    assert Words(None, ("ab",)).finder(tokenizer).dictionary.find("AB ab") == [(3, 5)]
    tokenizer.normalizer = normalizers.Lowercase()
    assert Words(None, ("ab",)).finder(tokenizer).dictionary.find("AB ab") == [(0, 2), (3, 5)]
