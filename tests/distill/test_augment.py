"""Copies of labelled texts with words replaced: candidates by hand, and a distillation that learns from copies."""

import dataclasses
import os
import signal

import pytest
import torch

pytest.importorskip("sklearn")

from fastbert.data.tokenizer import load_tokenizer, special_ids
from fastbert.distill import DistillConfig, augment, distill
from fastbert.distill.augment import Augmenter
from fastbert.models import BertConfig, BertForPreTraining

TEXT = "the film was a story, bycame night!"  # "bycame" is of two pieces


@pytest.fixture(scope="module")
def model(lesson, tmp_path_factory):
    tokenizer = load_tokenizer(lesson / "bert")
    torch.manual_seed(2)
    size = max(tokenizer.get_vocab().values()) + 1
    made = BertForPreTraining(BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, initializer_range=0.5,
    )).eval()  # fmt: skip
    with torch.no_grad():
        made.predictions.bias[tokenizer.token_to_id("film")] += 20  # the likeliest everywhere, in its own place too
    folder = tmp_path_factory.mktemp("masked")
    made.save_pretrained(folder, tokenizer=tokenizer)
    return folder, made, tokenizer


@torch.no_grad()
def by_hand(model, tokenizer, text, count):
    """Of each word of letters its candidates."""
    ids, mask = tokenizer.encode(text).ids, special_ids(tokenizer).mask
    words = {i: token for token, i in tokenizer.get_vocab().items() if token.isalnum()}
    candidates, table = {}, model.word_embeddings.double()
    for place, i in enumerate(ids):
        if i in words and not tokenizer.id_to_token(ids[place + 1]).startswith("##"):
            hidden = torch.tensor([[*ids[:place], mask, *ids[place + 1 :]]])
            scores = model(hidden).prediction_logits[0, place].tolist()
            best = sorted(set(words) - {i}, key=lambda word: -scores[word])
            candidates[words[i]] = {words[word] for word in best[:count]}
    pieces = tokenizer.encode("bycame", add_special_tokens=False).ids
    assert len(pieces) > 1
    near = torch.cosine_similarity(table, table[pieces].mean(0), dim=-1).tolist()
    candidates["bycame"] = {words[word] for word in sorted(words, key=lambda word: -near[word])[:count]}
    return candidates


def test_words_are_replaced_by_the_likeliest_and_the_nearest(model):
    _, model, tokenizer = model
    augmenter = Augmenter(model, tokenizer, copies=60, share=1.0, candidates=3, seed=0)
    candidates = by_hand(model, tokenizer, TEXT, 3)
    (copies,) = augmenter.copies_of([TEXT])
    assert len(copies) == 60
    order = ["the", "film", "was", "a", "story", "bycame", "night"]
    seen = {word: set() for word in order}
    for copy in copies:
        assert copy[-1] == "!" and copy.count(",") == 1, "marks stay"
        for word, new in zip(order, copy.replace(",", "").replace("!", "").split(), strict=True):
            seen[word].add(new)
    assert seen == candidates


def test_the_share_of_words_and_what_copies_depend_on(model):
    _, model, tokenizer = model
    texts = [TEXT, "", "a night\n by the sea", "the " * 37 + "bycame bycame"]
    make = Augmenter(model, tokenizer, copies=200, share=0.4, candidates=15, seed=3).copies_of
    made = make(texts)
    assert [len(copies) for copies in made] == [200] * 4 and set(made[1]) == {""}
    old = TEXT.split()
    changed = sum(a != b for copy in made[0] for a, b in zip(old, copy.split(), strict=True)) / (200 * len(old))
    assert abs(changed - 0.4) < 0.05
    assert all(copy.endswith(" bycame bycame") for copy in made[3]), "what the model does not see whole stays"
    assert make(texts[2:], 2) == made[2:] and make(texts[2:]) != made[2:]
    none = Augmenter(model, tokenizer, copies=1, share=0.0, candidates=15, seed=3)
    assert none.copies_of(texts) == [[TEXT], [""], ["a night by the sea"], [texts[3].strip()]]


def test_a_student_learns_from_copies_that_were_begun_before_a_stop(model, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "AT_ONCE", 16)
    config = DistillConfig(
        lesson / "teacher/model", "textcnn", lesson / "train.csv", tmp_path / "run", augment=2, augment_model=model[0],
        epochs=2, mix=1.0,
    )  # fmt: skip
    distill(config)
    lines = (config.output / "augmented.txt").read_text().splitlines()
    assert len(lines) == 2 * 86 and not (config.output / "augmented.part").exists()
    make, begun = Augmenter.copies_of, []

    def copies_of(self, texts, first=0):
        begun.append(first)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, texts, first)

    monkeypatch.setattr(Augmenter, "copies_of", copies_of)
    broken = dataclasses.replace(config, output=tmp_path / "broken")
    assert distill(broken) is None
    with (broken.output / "augmented.part").open("a") as file:
        file.write("a line that was cut o")
    table = lesson / "train.csv"
    text = table.read_text()
    try:
        table.write_text(text.replace("film", "play", 1))
        assert table.read_text() != text
        with pytest.raises(ValueError, match=r"copies of other texts than the labelled ones are now .*put the table"):
            distill(broken, resume=True)
    finally:
        table.write_text(text)
    distill(broken, resume=True)
    assert begun == [0, 16, 32, 48, 64, 80]
    assert (broken.output / "augmented.txt").read_text().splitlines() == lines
    for name in ("model.safetensors", "config.json"):
        assert (broken.output / "model" / name).read_bytes() == (config.output / "model" / name).read_bytes()


def test_settings_that_do_not_fit_are_refused(model, lesson, tmp_path):
    config = DistillConfig(lesson / "teacher/model", "textcnn", lesson / "train.csv", tmp_path / "run")
    for changes, why in (
        ({"augment": 2}, "--augment and --augment-model go together"),
        ({"augment_model": model[0]}, "--augment and --augment-model go together"),
        ({"augment": 2, "augment_model": lesson / "bert"}, "an encoder without its masked word head"),
        ({"augment": 2, "augment_model": model[0], "store": tmp_path / "store"}, "leave one out"),
        ({"augment": 2, "augment_model": model[0], "pair": "second"}, "--pair asks for two"),
    ):
        with pytest.raises(ValueError) as error:
            distill(dataclasses.replace(config, **changes))
        assert why in str(error.value) and not config.output.exists()
