"""What a run trains on is known by what it was made of."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fastbert.pretrain.prepare import check_fingerprints, fingerprints, prepare
from fastbert.pretrain.settings import PretrainConfig


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"the {animal} sleeps. it dreams of a {animal}." for animal in ["cat", "dog"] * 10))
    return PretrainConfig(
        output=tmp_path / "run", corpus=corpus, tokenizer="wordpiece", vocab_size=64, held_out=0.2, steps=1
    )


def test_the_share_of_unknown_words_is_said(config, capsys):
    """Rare letters that a small vocabulary has no room for; [UNK] is never predicted."""
    prepare(config, resume=False)
    assert "[UNK]: 0.0% of" in capsys.readouterr().out
    rare = " ".join(chr(0x4E00 + i) for i in range(400))
    config.corpus.write_text(config.corpus.read_text() + "\n\n" + rare)
    prepare(config, resume=False)
    said = capsys.readouterr().out
    assert "warning: the vocabulary does not know so much of the text" in said and "--vocab-size" in said


@pytest.mark.parametrize(("words", "said"), [("ดี กิน กัน", True), ("हिन्दी किताब", True), ("Köln première", False)])
def test_vowel_signs_that_lower_casing_strips_are_said(config, capsys, words, said):
    config.corpus.write_text("\n\n".join([words] * 30))
    prepare(config, resume=False)
    assert ("warning: the text has" in (out := capsys.readouterr().out) and "--no-lowercase" in out) == said
    prepare(dataclasses.replace(config, lowercase=False), resume=False)
    assert "warning" not in capsys.readouterr().out


def written(folder):
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_second_try_reuses_what_has_the_same_corpus_and_settings(config):
    tokenizer, _, _ = prepare(config, resume=False)
    first = written(config.output / "tokenizer"), written(config.output / "data/00000/train")
    prepare(config, resume=False)
    assert (written(config.output / "tokenizer"), written(config.output / "data/00000/train")) == first

    # another split: the tokenizer is the same
    other = dataclasses.replace(config, held_out=0.5)
    _, train, held_out = prepare(other, resume=False)
    assert written(config.output / "tokenizer") == first[0] and len(train.documents) == len(held_out.documents)

    # other settings of the tokenizer, another corpus of the same size: everything is made anew
    cased = dataclasses.replace(other, lowercase=False)
    prepare(cased, resume=False)
    assert written(config.output / "tokenizer") != first[0]
    config.corpus.write_text(config.corpus.read_text().replace("cat", "cow"))
    now, store, _ = prepare(cased, resume=False)
    assert "cow" in now.get_vocab() and "cat" not in now.get_vocab() and "cat" in tokenizer.get_vocab()
    assert now.token_to_id("cow") in np.asarray(store.tokens)


def test_what_no_run_made_is_left_alone(config):
    mine = config.output / "data/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ValueError, match=r"run/data would be the new run's, and corpus\.json .* does not say"):
        prepare(config, resume=False)
    assert mine.read_text() == "years of work" and not (config.output / "tokenizer").exists()


def test_resume_needs_no_corpus_while_the_data_is_there(config):
    made = fingerprints(*prepare(config, resume=False))
    config.corpus.unlink()
    assert fingerprints(*prepare(config, resume=True)) == made


@pytest.mark.parametrize("gone", [["data"], ["tokenizer"], ["data", "tokenizer"]])
def test_resume_makes_what_is_gone_of_the_same_corpus_alone(config, gone):
    made = fingerprints(*prepare(config, resume=False))
    for name in gone:
        shutil.rmtree(config.output / name)
    assert fingerprints(*prepare(config, resume=True)) == made

    for name in gone:
        shutil.rmtree(config.output / name)
    text = config.corpus.read_text()
    config.corpus.write_text(text.replace("dog", "fox"))
    with pytest.raises(ValueError, match=r"lacks its tokenizer/ or data/, and the corpus .*corpus\.txt is not known"):
        prepare(config, resume=True)
    assert not any((config.output / name).exists() for name in gone)

    config.corpus.write_text(text)
    (config.output / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match=r"no readable corpus\.json says what it was made of"):
        prepare(config, resume=True)


def test_documents_held_out_by_other_random_numbers(config):
    """A new run draws them anew, a resumed one keeps them, and refuses to draw others in their place."""
    made = fingerprints(*prepare(config, resume=False))
    said = json.loads((config.output / "corpus.json").read_text())
    assert said["data"].pop("random numbers") == 3

    def forget():
        (config.output / "corpus.json").write_text(json.dumps(said))
        return written(config.output / "tokenizer"), written(config.output / "data")

    before = forget()
    assert fingerprints(*prepare(config, resume=True)) == made
    assert forget() == before
    prepare(config, resume=False)
    assert written(config.output / "tokenizer") == before[0] and written(config.output / "data") != before[1]
    forget()
    shutil.rmtree(config.output / "data")
    with pytest.raises(ValueError, match=r"lacks its data/, whose held-out documents were drawn by contract 1 of"):
        prepare(config, resume=True)
    assert not (config.output / "data").exists()


@pytest.mark.parametrize(
    "damage", ["data/00000/train", "data/00000/held_out/meta.json", "data/00000/train/tokens.bin", "tokenizer"]
)
def test_what_is_damaged_is_named_and_made_again_once_it_is_removed(config, damage):
    made = fingerprints(*prepare(config, resume=False))
    path = config.output / damage
    if damage == "tokenizer":
        (path / "tokenizer.json").write_text("{")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:-3])
    folder = config.output / damage.split("/")[0]
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"{folder} cannot be used: .*. Remove it as a whole"):
            prepare(config, resume)
    shutil.rmtree(folder)
    assert fingerprints(*prepare(config, resume=True)) == made


def test_another_run_s_data_is_refused(config, tmp_path):
    made = fingerprints(*prepare(config, resume=False))
    reseeded = dataclasses.replace(config, seed=1, output=tmp_path / "reseeded")
    cased = dataclasses.replace(config, lowercase=False, vocab_size=70, output=tmp_path / "cased")
    for other in (reseeded, cased):
        prepare(other, resume=False)
        shutil.rmtree(config.output / "data")
        shutil.copytree(other.output / "data", config.output / "data")
        if other is cased:
            with pytest.raises(ValueError, match="is of another tokenizer"):
                prepare(config, resume=True)
            continue
        now = fingerprints(*prepare(config, resume=True))
        check_fingerprints(made, made, config.output)
        with pytest.raises(ValueError, match="with another training text and another held-out text than the folder"):
            check_fingerprints(made, now, config.output)


def test_a_folder_of_texts_is_known_by_names_and_contents(config):
    folder = config.corpus.with_name("texts")
    folder.mkdir()
    for name in "ab":
        shutil.copy(config.corpus, folder / f"{name}.txt")
    config = dataclasses.replace(config, corpus=folder)
    prepare(config, resume=False)
    said = json.loads((config.output / "corpus.json").read_text())
    assert said["corpus"]["files"] == 2 and said["corpus"]["bytes"] == 2 * (folder / "a.txt").stat().st_size
    before = written(config.output / "data")
    (folder / "a.txt").rename(folder / "c.txt")  # another order of the documents
    prepare(config, resume=False)
    assert written(config.output / "data") != before
