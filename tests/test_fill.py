"""`fastbert fill`: beside a telling of its rule with whole models, and what it says and refuses."""

import json
import sys

import pytest
import torch
from pretrain_runs import bad
from transformers import AutoModelForMaskedLM

from fastbert import cli
from fastbert.data import special_ids, train_byte_bpe, train_tokenizer
from fastbert.fill import fill_masks, load_masked_lm
from fastbert.models.auto import PRETRAINING

TEXTS = ["诸葛亮说明天下雨", "we go to New York at noon", "周瑜道孔明真神人也"] * 3
TRAINERS = {"roberta": train_byte_bpe}


@pytest.fixture(scope="module", params=["bert", "albert", "roberta", "ernie"])
def folder(request, tmp_path_factory):
    """A model of random weights, so large that its guesses differ, with 300 words."""
    tokenizer = TRAINERS.get(request.param, train_tokenizer)(TEXTS, 300)
    kind = PRETRAINING[request.param]
    torch.manual_seed(5)
    model = kind(
        kind.config_class.preset(
            "tiny", vocab_size=max(tokenizer.get_vocab().values()) + 1, pad_token_id=special_ids(tokenizer).pad,
            max_position_embeddings=66, initializer_range=0.2,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, tokenizer=tokenizer)
    return path, tokenizer


def by_hand(model, tokenizer, text, places, at_once):
    """All fillings of neighbouring places, by transformers, one place after another or each as all are hidden."""
    start, special = tokenizer.encode(text).ids, set(special_ids(tokenizer))
    beams = {(): 1.0}
    for place in places:
        grown = {}
        for ids, probability in beams.items():
            now = list(start)
            for at, token in zip(places, () if at_once else ids, strict=False):
                now[at] = token
            row = model(torch.tensor([now])).logits[0, place].double().softmax(-1)
            grown |= {(*ids, i): probability * p for i, p in enumerate(row.tolist()) if i not in special}
        beams = dict(sorted(grown.items(), key=lambda each: -each[1])[:64])
    return beams


@pytest.mark.parametrize("at_once", [False, True])
def test_gaps_are_filled_as_the_rule_says(at_once, folder, capsys, monkeypatch):
    path, tokenizer = folder
    mask = tokenizer.id_to_token(special_ids(tokenizer).mask)
    texts = ["we go to [MASK] at [MASK][MASK]", "诸葛亮[MASK][MASK]下雨", "[MASK]"]
    model = load_masked_lm(path)
    filled = fill_masks(model, tokenizer, texts, top_k=16, at_once=at_once)
    assert [len(gaps) for gaps in filled] == [2, 1, 1]
    theirs = AutoModelForMaskedLM.from_pretrained(path).eval()
    for text, gaps in zip(texts, filled, strict=True):
        text = text.replace("[MASK]", mask)
        ids = tokenizer.encode(text).ids
        places = [i for i, token in enumerate(ids) if token == special_ids(tokenizer).mask]
        groups = [[places[0]], places[1:]] if len(gaps) == 2 else [places]
        for group, words in zip(groups, gaps, strict=True):
            with torch.no_grad():
                expected = by_hand(theirs, tokenizer, text, group, at_once)
            assert [word.probability for word in words] == pytest.approx([*expected.values()][:16], rel=1e-3)
            assert all(word.probability == pytest.approx(expected[word.ids], rel=1e-3) for word in words)
            assert words[0].ids == next(iter(expected)) and len({word.ids for word in words}) == 16
    chinese = filled[1][0]
    assert not any(" " in word.word for word in chinese if all("一" < c < "龥" for c in word.word if c != " "))

    monkeypatch.setattr(sys, "argv", ["fastbert", "fill", str(path), *texts, "--top-k", "2", *["--at-once"] * at_once])
    cli.main()
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [texts[0], "  gap 1", f"  {filled[0][0][0].probability:7.2%}  {filled[0][0][0].word}"]
    assert len(said) == 7 + 3 + 3
    monkeypatch.setattr(sys, "argv", ["fastbert", "fill", str(path), "[MASK]", "--json"])
    cli.main()
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == "[MASK]" and [word["ids"] for word in row["gaps"][0]] == [
        list(w.ids) for w in filled[2][0][:5]
    ]


def test_what_is_refused(folder, capsys, monkeypatch, tmp_path):
    path, tokenizer = folder
    says = lambda *arguments: bad(capsys, monkeypatch, "fill", *arguments)  # noqa: E731
    mask = tokenizer.id_to_token(special_ids(tokenizer).mask)
    assert f"a text has no gap to fill: write {mask} where" in says(path, "nothing")
    assert "tokens, and the model takes" in says(path, "[MASK]" + "亮" * 200)
    assert "top_k must be an integer from 1 to 1000, got 0" in says(path, "[MASK]", "--top-k", "0")
    model = load_masked_lm(path)
    model.base_model.save_pretrained(tmp_path / "encoder", tokenizer=tokenizer)
    assert "holds an encoder without its masked word head" in says(tmp_path / "encoder", "[MASK]")
    model.save_pretrained(tmp_path / "decoder", tokenizer=tokenizer)
    file = tmp_path / "decoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_decoder": True}))
    assert "is_decoder" in says(tmp_path / "decoder", "[MASK]"), "its guesses would be of the next token"
