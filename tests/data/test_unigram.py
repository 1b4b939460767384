"""The Unigram tokenizer: repeatable, read by transformers as its AlbertTokenizer, special tokens never out of text."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers

from fastbert.data import PretrainBatches, continuations, load_tokenizer, save_tokenizer, special_ids, train_unigram
from fastbert.data.store import TokenStore
from fastbert.data.tokenizer import fingerprint
from fastbert.data.writer import write_store

PUBLISHED = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")  # in the vocabularies of the ALBERTs that Google trained
TEXTS = [topics[name] for name in sorted(topics)][:12]
SAMPLES = [
    "The yield expression is used when defining a generator.",
    "Ünïcode, ``quotes'' and «marks»; 3.14159 -- tabs\tand\nlines",
    "[MASK] [CLS]spelled[SEP]out",
    "漢字 with words",
    "",
]


@pytest.fixture(scope="module", params=[True, False], ids=["lowercase", "cased"])
def tokenizer(request):
    return train_unigram(TEXTS, 400, request.param)


def test_transformers_reads_the_same_ids(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, max_length=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "AlbertTokenizer" and theirs.is_fast and theirs.model_max_length == 64
    assert [getattr(theirs, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")] == [0, 1, 2, 3, 4]
    loaded = load_tokenizer(tmp_path)
    for text in (*SAMPLES, *TEXTS[:3]):
        ids = tokenizer.encode(text).ids
        assert theirs(text).input_ids == ids == loaded.encode(text).ids, text
    pair = tokenizer.encode(SAMPLES[0], SAMPLES[1])
    given = theirs(SAMPLES[0], SAMPLES[1], return_token_type_ids=True)
    assert given.input_ids == pair.ids and given.token_type_ids == pair.type_ids
    lines = (tmp_path / "vocab.txt").read_text().split("\n")
    assert [lines.index(token) for token in ("[PAD]", "[MASK]")] == [0, 4] and len(lines) == 400 + 1
    assert fingerprint(loaded) == fingerprint(tokenizer)


def test_the_same_texts_give_the_same_vocabulary(tokenizer):
    """Each training has other hash tables, in whose order the trainer adds up: by itself it gives other scores."""
    lowercase = "Lowercase" in tokenizer.to_str()
    assert all(train_unigram(iter(TEXTS), 400, lowercase).to_str() == tokenizer.to_str() for _ in range(3))


def test_pieces_are_likely_first_and_special_tokens_are_no_text(tokenizer, tmp_path):
    assert special_ids(tokenizer) == (0, 1, 2, 3, 4) and tokenizer.get_vocab_size() == 400
    scores = [score for _, score in json.loads(tokenizer.to_str())["model"]["vocab"]][5:]
    assert scores == sorted(scores, reverse=True) == [round(score, 3) for score in scores]
    assert tokenizer.decode(tokenizer.encode("the value of the name").ids) == "the value of the name"
    write_store(tmp_path / "store", [["so [MASK] is", "[SEP]"]], tokenizer, progress=False)
    assert not np.isin(TokenStore.open(tmp_path / "store").tokens, [0, 2, 3, 4]).any()


def test_scores_decide_ids_and_are_in_the_fingerprint():
    a, b = (train_unigram(["a few words of a text, a few"] * 2, 64) for _ in range(2))
    assert fingerprint(a) == fingerprint(b)
    vocab = json.loads(b.to_str())["model"]["vocab"]
    b.model = models.Unigram([*map(tuple, vocab[:-1]), (vocab[-1][0], vocab[-1][1] - 0.5)], unk_id=1)
    assert a.get_vocab() == b.get_vocab() and fingerprint(a) != fingerprint(b)


def test_continuations_are_letters_behind_a_word_s_beginning(tokenizer):
    continues, vocab = continuations(tokenizer), tokenizer.get_vocab()
    assert not continues[:5].any() and not any(continues[i] for token, i in vocab.items() if token.startswith("▁"))
    assert continues[vocab["s"]] and not continues[vocab[","]] and not continues[vocab["."]]
    # As in ALBERT's own program, but for letters beyond English, "é" and "ия", which begin words there.
    inside = ["s", "Ing", "-based", "...", ".)", "é", "e\u0301", "ия"]
    begin = ["▁s", "▁", ".", "_", "'", "'s", "19", "b2b", "</p>", "a=b", "€", "漢", "a漢", "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in (*PUBLISHED, *begin, *inside)], unk_id=1))
    assert continuations(tokenizer).tolist() == [False] * (5 + len(begin)) + [True] * len(inside)


@pytest.mark.parametrize("more", [[], [normalizers.Strip()]], ids=["AlbertTokenizer", "TokenizersBackend"])
def test_published_alberts_spell_special_tokens_otherwise(tmp_path, more, request):
    """Read, trained on and written again; with a normaliser beyond AlbertTokenizer's, tokenizer.json as it is."""
    transformers = pytest.importorskip("transformers")
    letters = [(mark + x, -5.0) for x in "abcdefghijklmnopqrstuvwxyz." for mark in ("", "▁")]
    vocab = [*((token, 0.0) for token in PUBLISHED), ("▁the", -2.0), ("ing", -3.0), *letters]
    theirs = transformers.AlbertTokenizerFast(vocab=vocab)
    theirs.save_pretrained(tmp_path / "published")
    tokenizer = load_tokenizer(tmp_path / "published")
    tokenizer.normalizer = normalizers.Sequence([*tokenizer.normalizer, *more])
    special = special_ids(tokenizer)
    assert special == (0, 1, 2, 3, 4)
    text = "The thing is sinking."
    assert tokenizer.encode(text).ids == theirs(text).input_ids

    with pytest.raises(ValueError, match=r"are \[UNK\] or another special one"):
        write_store(tmp_path / "unknown", [["漢"]], tokenizer, progress=False)
    write_store(tmp_path / "store", [[text, "A thing sings.", "漢 sinks."]] * 4, tokenizer, progress=False)
    settings = {"seq_len": 32, "batch_tokens": 512, "seed": 0, "mask_prob": 0.5, "mask_share": 1, "random_share": 0}
    continues = continuations(tokenizer)
    batch = PretrainBatches(
        TokenStore.open(tmp_path / "store"), special, objective="mlm+sop", continues=continues, **settings
    )[0]
    assert (batch.input_ids[batch.masked_positions] == 4).all() and not set(batch.labels.tolist()) & set(special)
    assert (batch.input_ids[batch.cu_seqlens[:-1].long()] == 2).all() and 1 in batch.input_ids

    save_tokenizer(tokenizer, tmp_path / "written")
    (tmp_path / "written/config.json").write_text(json.dumps({"model_type": "albert"}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    assert type(again).__name__ == request.node.callspec.id and again(text).input_ids == theirs(text).input_ids
    assert again([text, "a"], padding=True).input_ids[1][-1] == again.pad_token_id == 0
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert tuple(getattr(again, f"{role}_token") for role in roles) == PUBLISHED


def test_text_without_spaces():
    """No sentence occurs twice, and what it is made of does."""
    words = ["电影", "非常", "好看", "我们", "今天", "喜欢", "音乐", "孩子"]
    rng = np.random.default_rng(0)
    tokenizer = train_unigram(["".join(rng.choice(words, 12)) for _ in range(200)], 64)
    assert set(words) <= tokenizer.get_vocab().keys()
    assert tokenizer.encode("今天我们非常喜欢电影").tokens[1:-1] == ["▁今天", "我们", "非常", "喜欢", "电影"]


def test_few_and_many_characters():
    """A third of the vocabulary at most are characters; others are [UNK] and part the pieces beside them."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    tokenizer = train_unigram([rare, *["word and word again, wordless words"] * 9], 64)
    assert len([token for token in tokenizer.get_vocab() if len(token) == 1]) <= 64 // 3
    tokens = tokenizer.encode(f"word{rare[400]}word", add_special_tokens=False).tokens
    assert 0 < sum(token not in tokenizer.get_vocab() for token in tokens) < len(tokens)
    assert train_unigram([rare, "A text"] * 2, 64, lowercase=False).get_vocab_size() <= 64


@pytest.mark.parametrize(
    ("texts", "size", "error", "says"),
    [
        (["a"], 63, ValueError, "expected >= 64, got 63"),
        ("a text", 64, TypeError, "one string came: put it into a list"),
        (["", " "], 64, ValueError, "hold no word"),
    ],
)
def test_what_cannot_be_trained_is_refused(texts, size, error, says):
    with pytest.raises(error, match=says):
        train_unigram(texts, size)
