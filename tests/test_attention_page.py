"""`fastbert attention`: probabilities beside those of transformers, the page in a real browser, the picture."""

import base64
import json
import re
import struct
import sys

import browser
import pytest
import torch
from pretrain_runs import bad

from fastbert import attention_page, cli
from fastbert.attention_page import draw, page, probabilities
from fastbert.data import load_tokenizer, special_ids, train_byte_bpe, train_tokenizer
from fastbert.models.auto import ENCODERS, AutoModel

TEXTS = ["the film was long", "a film"]


@pytest.fixture(scope="module", params=["bert", "albert", "roberta", "ernie", "bert clm"])
def folder(request, tmp_path_factory):
    name, _, objective = request.param.partition(" ")
    tokenizer = {"roberta": train_byte_bpe}.get(name, train_tokenizer)(TEXTS * 3, 300)
    torch.manual_seed(5)
    kind = ENCODERS[name]
    config = kind.config_class.preset(
        "tiny", vocab_size=max(tokenizer.get_vocab().values()) + 1, pad_token_id=special_ids(tokenizer).pad,
        max_position_embeddings=66, initializer_range=0.2, num_hidden_layers=3,
        is_decoder=objective == "clm",
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    kind(config).save_pretrained(path, tokenizer=tokenizer)
    return path


def test_probabilities_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    encoding = load_tokenizer(folder).encode(*TEXTS)
    ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
    model = AutoModel.from_pretrained(folder)
    found = probabilities(model, ids, types.clamp(max=model.config.type_vocab_size - 1))
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        types = types.clamp(max=theirs.config.type_vocab_size - 1)
        expected = theirs(ids, token_type_ids=types, output_attentions=True).attentions
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_the_page_draws_a_head_and_changes_it_by_a_click(folder, tmp_path, monkeypatch, capsys):
    html, png = tmp_path / "a.html", tmp_path / "a.png"
    arguments = [str(folder), *TEXTS, "--output", str(html), "--png", str(png)]
    monkeypatch.setattr(sys, "argv", ["fastbert", "attention", *arguments])
    cli.main()
    assert capsys.readouterr().out == f"written: {html}\npicture: {png}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "http" not in html.read_text()
    if folder.name[:4] != "bert":
        return  # the page is the same
    tokens = load_tokenizer(folder).encode(*TEXTS).ids
    size, model = len(tokens), AutoModel.from_pretrained(folder)
    types = torch.tensor([load_tokenizer(folder).encode(*TEXTS).type_ids])
    found = probabilities(model, torch.tensor([tokens]), types)
    with browser.page(html) as page:
        # The middle of each cell as it is drawn, its opacity of 255.
        drawn = f"""[...Array({size}).keys()].flatMap(i => [...Array({size}).keys()].map(j =>
            pen.getImageData(margin + cell * (j + .5), margin + cell * (i + .5), 1, 1).data[3]))"""
        for layer, head in ((0, 0), (2, 1)):
            page.click(f"button[data-layer='{layer}'][data-head='{head}']")
            assert page.value("document.querySelector('#title').textContent") == f"layer {layer + 1}, head {head + 1}"
            alpha = torch.tensor(page.value(drawn)).view(size, size) / 255
            torch.testing.assert_close(alpha, found[layer, head], rtol=0, atol=0.01)
        page.press("ArrowRight")
        assert page.value("document.querySelector('#title').textContent") == "layer 3, head 1"
        x, y = page.value("(b => [b.x + margin + cell * 2.5, b.y + margin + cell * 1.5])(view.getBoundingClientRect())")
        page.move(x, y)
        said = page.value("document.querySelector('#said').textContent")
        assert said.endswith(f" {100 * found[2, 0, 1, 2]:.1f} %") and "→" in said
        page.click("#lines")
        assert page.value("pen.getImageData(0, 0, view.width, view.height).data.some(x => x > 0)")
        assert page.requests == [html.resolve().as_uri()] and not page.errors


def test_a_token_does_not_end_the_script():
    written = page(torch.eye(2).view(1, 1, 2, 2), ["</script>", "__DATA__"], [0, 1], "<b>")
    assert written.count("</script>") == 1 and "<b>" not in written
    data = json.loads(re.search("const data = (.*);", written)[1])
    assert data["tokens"] == ["</script>", "__DATA__"] and data["model"] == "<b>" and data["second"] == 1
    assert base64.b64decode(data["probabilities"]) == b"\xff\xff\0\0\0\0\xff\xff"


def test_a_picture_takes_any_token(tmp_path, capsys):
    """A formula's sign is none, and what no font has is said once."""
    draw(torch.rand(1, 2, 3, 3), ["$$", "\\frac", "\ue000"], tmp_path / "a.png")
    assert capsys.readouterr().out.startswith("no font here has \ue000: boxes stand for them")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_so_many_pixels_at_most(tmp_path, monkeypatch):
    """Width and height of a PNG are the 17th to 24th byte."""
    for most, expected in ((attention_page.MOST_PIXELS, (510, 345)), (10_000, (121, 82))):
        monkeypatch.setattr(attention_page, "MOST_PIXELS", most)
        draw(torch.rand(1, 2, 3, 3), ["a", "b", "c"], tmp_path / "a.png")
        assert struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]) == expected


def test_what_cannot_be_shown_is_refused(folder, tmp_path, capsys, monkeypatch):
    said = bad(capsys, monkeypatch, "attention", folder, "film " * 200, "--output", tmp_path / "a.html")
    assert "too many to be looked at" in said
    said = bad(capsys, monkeypatch, "attention", folder, "film", "--output", tmp_path / "a.txt")
    assert "output must be a file that ends in .html" in said
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").mkdir()
    given = "attention", folder, "film", "--output", tmp_path / "a.html", "--png", tmp_path / "a.png"
    assert "png must be a file that ends in .png, not a folder" in bad(capsys, monkeypatch, *given)
    assert not (tmp_path / "a.html").exists()
