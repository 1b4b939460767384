"""A tokenizer's files: saved, exported, copied or of old, they give the same ids in transformers and here."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from fastbert import tokenizer_files
from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.models.bert import BertConfig, BertForPreTraining

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "Köln", "koln", "liegt", "am", "Rhein", "rhein", "中", "国", "中国", "##s", "a", "film"]
TEXTS = ["Köln liegt am Rhein", "A films", "中国 a [MASK] film", "a <e1> film </e1> [E2]a", "☃"]


def bert_tokenizer(words=WORDS, framed=True, **normalizer) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in words])
    if framed:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = bert_tokenizer()
    tokenizer.add_tokens(["<e1>", AddedToken("</e1>", lstrip=True, normalized=False)])
    tokenizer.add_special_tokens(["[E2]"])
    return tokenizer


def sequence() -> Tokenizer:
    tokenizer = bert_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def unnormalized() -> Tokenizer:
    tokenizer = bert_tokenizer()
    tokenizer.normalizer = None
    return tokenizer


KINDS = {
    "uncased": (bert_tokenizer, "BertTokenizer"),
    "cased": (lambda: bert_tokenizer(lowercase=False), "BertTokenizer"),
    "cased, accents stripped": (lambda: bert_tokenizer(lowercase=False, strip_accents=True), "BertTokenizer"),
    "accents kept": (lambda: bert_tokenizer(strip_accents=False), "BertTokenizer"),
    "Chinese words whole": (lambda: bert_tokenizer(handle_chinese_chars=False), "BertTokenizer"),
    "added tokens": (with_added_tokens, "BertTokenizer"),
    "control characters kept": (lambda: bert_tokenizer(clean_text=False), "PreTrainedTokenizerFast"),
    "no [CLS] and [SEP]": (lambda: bert_tokenizer(framed=False), "PreTrainedTokenizerFast"),
    "no [MASK]": (lambda: bert_tokenizer([w for w in WORDS if w != "[MASK]"]), "PreTrainedTokenizerFast"),
    "another normaliser": (sequence, "PreTrainedTokenizerFast"),
    "no normaliser": (unnormalized, "PreTrainedTokenizerFast"),
}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    return module


@pytest.fixture(scope="module")
def model():
    return BertForPreTraining(BertConfig(len(WORDS) + 3, 8, 1, 1, 8, max_position_embeddings=16))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_and_its_copy_give_the_same_ids_in_transformers_and_here(transformers, model, tmp_path, kind):
    tokenizer, cls = KINDS[kind][0](), KINDS[kind][1]
    model.save_pretrained(tmp_path / "exported", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "copied", tokenizer=tmp_path / "exported")
    save_tokenizer(tokenizer, tmp_path / "saved")
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert json.loads((tmp_path / "exported/tokenizer_config.json").read_text())["tokenizer_class"] == cls
    for name in ("exported", "copied", "saved"):
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / name), load_tokenizer(tmp_path / name)
        assert [theirs(text)["input_ids"] for text in TEXTS] == expected, name
        assert [ours.encode(text).ids for text in TEXTS] == expected, name
        assert theirs.pad_token_id == 0
        assert theirs.model_max_length == (16 if name != "saved" else int(1e30))


@pytest.mark.parametrize("kind", [kind for kind, (_, cls) in KINDS.items() if cls == "BertTokenizer"])
def test_a_folder_with_vocab_txt_alone_gives_the_ids_of_transformers(transformers, tmp_path, kind):
    """As older BERT folders have it; settings and added tokens stand in the files beside it."""
    tokenizer = KINDS[kind][0]()
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert [load_tokenizer(tmp_path).encode(text).ids for text in TEXTS] == expected
    assert [transformers.BertTokenizer.from_pretrained(tmp_path)(text)["input_ids"] for text in TEXTS] == expected


def test_tokenizer_config_is_heeded_more_than_tokenizer_json(transformers, tmp_path):
    save_tokenizer(bert_tokenizer(lowercase=False), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": True}))
    assert load_tokenizer(tmp_path).encode("Köln liegt am Rhein").ids == [2, 6, 7, 8, 10, 3]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("Köln liegt am Rhein")["input_ids"] == [
        2,
        6,
        7,
        8,
        10,
        3,
    ]


def test_cased_by_hand(model, tmp_path):
    model.save_pretrained(tmp_path, tokenizer=bert_tokenizer(lowercase=False))
    assert load_tokenizer(tmp_path).encode("Köln liegt am Rhein").ids == [2, 5, 7, 8, 9, 3]
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*WORDS, ""]


def old_folder(folder: Path, lines: list[str], **files) -> Path:
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"do_lower_case": False}},
        {"added_tokens": {"<e1>": 17, "[E2]": 18}, "special_tokens_map": {"additional_special_tokens": ["[E2]"]}},
        {"special_tokens_map": {"additional_special_tokens": ["[E2]", "<e1>"]}},
    ],
    ids=["vocab.txt alone", "cased", "added tokens", "special tokens without an id"],
)
def test_an_old_folder_and_what_is_copied_of_it_keep_every_token(transformers, model, tmp_path, files):
    old_folder(tmp_path, WORDS, **files)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    model.save_pretrained(tmp_path / "copied", tokenizer=tmp_path)
    expected = [transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] for text in TEXTS]
    copied = transformers.AutoTokenizer.from_pretrained(tmp_path / "copied")
    assert [copied(text)["input_ids"] for text in TEXTS] == expected
    assert [load_tokenizer(tmp_path / "copied").encode(text).ids for text in TEXTS] == expected
    if "added_tokens" in files:
        assert 17 in expected[3] and 18 in expected[3]


def test_an_earlier_tokenizer_leaves_nothing_behind(model, tmp_path):
    model.save_pretrained(tmp_path, tokenizer=with_added_tokens())
    assert (tmp_path / "added_tokens.json").exists()
    model.save_pretrained(tmp_path, tokenizer=bert_tokenizer())
    assert not (tmp_path / "added_tokens.json").exists()
    assert load_tokenizer(tmp_path).token_to_id("<e1>") is None
    model.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("a film").ids == [2, 15, 16, 3], "no tokenizer given: what is there stays"


def test_a_vocabulary_with_a_token_twice_is_refused_with_both_lines(tmp_path):
    with pytest.raises(ValueError, match=r"vocab\.txt has the token 'am' in line 9 and again in line 18"):
        load_tokenizer(old_folder(tmp_path, [*WORDS, "am"]))
    with pytest.raises(ValueError, match=r"the token '' in line 6 and again in line 8"):
        load_tokenizer(old_folder(tmp_path, [*SPECIAL, "", "a", ""]))


def test_one_blank_line_is_an_id_of_its_own(transformers, tmp_path):
    old_folder(tmp_path, [*SPECIAL, "", "a", "film"])
    assert load_tokenizer(tmp_path).encode("a film").ids == [2, 6, 7, 3]
    assert transformers.BertTokenizer.from_pretrained(tmp_path)("a film")["input_ids"] == [2, 6, 7, 3]


def test_a_tokenizer_that_gives_an_id_twice_is_refused(model, tmp_path):
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "b": 3}, unk_token="[UNK]"))
    files = tokenizer_files.make(tokenizer)
    assert files["vocab.txt"] == b"[UNK]\na\n\nb\n", "the unused id keeps its line"
    tokenizer.add_tokens(["x"])  # gets the id 3, as three tokens are before it
    with pytest.raises(ValueError, match=r"have the same id 3"):
        model.save_pretrained(tmp_path / "new", tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"token 'z' has id 20, but the model's vocab_size is 20"):
        model.save_pretrained(tmp_path / "new", tokenizer=bert_tokenizer([*WORDS, "w", "x", "y", "z"]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<e1>": 99}}, r"'<e1>' should have id 99, and 17 comes next"),
        ({"added_tokens": ["<e1>"]}, r"added_tokens\.json must hold an object, got list"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(old_folder(tmp_path, WORDS, **files))


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"vocab\.txt lacks \[MASK\]"):
        load_tokenizer(old_folder(tmp_path, SPECIAL[:4]))
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a git-lfs pointer.*git lfs pull"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_a_run_exports_as_it_was_trained(transformers, tmp_path):
    tokenizer = train_tokenizer(["Köln liegt am Rhein"] * 9, 64, lowercase=False)
    config = BertConfig(tokenizer.get_vocab_size(), 8, 1, 1, 8, max_position_embeddings=16)
    BertForPreTraining(config).save_pretrained(tmp_path, tokenizer=tokenizer)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("Köln liegt am Rhein")["input_ids"]
    assert ids == tokenizer.encode("Köln liegt am Rhein").ids
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(ids) == "Köln liegt am Rhein"
