"""ELMo: the LSTMs against a recurrence written by hand, what each direction may see, the sampled softmax, folders."""

import math

import pytest
import torch
from torch.testing import assert_close

from fastbert import AutoModel, ElmoConfig, ElmoForPreTraining, ElmoModel
from fastbert.models.sampled_softmax import LogUniform, sampled_softmax_loss

LENGTHS = 7, 1, 0, 12, 3, 12, 11, 12, 2, 10, 9, 2, 2, 3, 1, 2, 3, 2, 2  # of two rectangles, and an empty sequence


def make(kind=ElmoForPreTraining, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "cell_size": 6, "projection_size": None, "num_hidden_layers": 2, "max_length": 16}
    return kind(ElmoConfig(**sizes | more)).eval()


def packed():
    lengths = torch.tensor(LENGTHS)
    ids = torch.randint(1, 40, (int(lengths.sum()),), generator=torch.Generator().manual_seed(1))
    return ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def lstm_by_hand(lstm, x):
    """x [S, W] -> [S, W] in float64: gates i, f, g, o, and the projection of the output, if any."""
    w, r, bias = (getattr(lstm, f"{name}_l0").double() for name in ("weight_ih", "weight_hh", "bias_ih"))
    bias = bias + lstm.bias_hh_l0.double()
    project = lstm.weight_hr_l0.double() if lstm.proj_size else torch.eye(lstm.hidden_size, dtype=torch.float64)
    h, c, out = torch.zeros(len(project)).double(), torch.zeros(lstm.hidden_size).double(), []
    for step in x:
        i, f, g, o = (w @ step + r @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = project @ (torch.sigmoid(o) * torch.tanh(c))
        out.append(h)
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("projection", [None, 4])
def test_layers_are_those_of_a_recurrence_by_hand_each_sequence_alone(projection):
    model = make(ElmoModel, projection_size=projection)
    ids, bounds = packed()
    out = model(ids, cu_seqlens=bounds, max_seqlen=12)
    assert len(out.hidden_states) == 3 and out.sequence_output is out.hidden_states[-1]
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if start == end:
            continue
        x = model.word_embeddings.weight[ids[start:end]].double()
        forth, back = (x, x.flip(0))
        for number in range(3):
            if number:
                forth, back = (
                    lstm_by_hand(lstms[number - 1], below) + (below if number > 1 else 0)
                    for lstms, below in ((model.forth, forth), (model.back, back))
                )
            expected = torch.cat([forth, back.flip(0)], 1)
            assert_close(out.hidden_states[number][start:end].double(), expected, rtol=0, atol=1e-6)
    padded = torch.zeros(len(LENGTHS), 12, dtype=torch.int64)
    mask = torch.arange(12) < torch.tensor(LENGTHS).unsqueeze(1)
    padded[mask] = ids
    assert_close(model(padded, mask).sequence_output[mask], out.sequence_output)
    assert model(ids[:0], cu_seqlens=torch.zeros(2, dtype=torch.int32)).sequence_output.shape == (0, out[0].shape[1])


def test_no_direction_sees_what_it_predicts():
    """Changed at one place, the token moves forward predictions from there on and backward ones up to there alone."""
    model = make()
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, 4] = ids[0, 4] % 39 + 1
    with torch.no_grad():
        forth, back = model(ids).prediction_logits != model(other).prediction_logits
    moved = lambda x: x.any(-1).nonzero().tolist()  # noqa: E731
    assert moved(forth) == [[0, place] for place in range(4, 9)], "that at 3 predicts the word at 4"
    assert moved(back) == [[0, place] for place in range(5)], "that at 5 predicts the word at 4"


def test_the_loss_is_the_mean_of_both_directions_at_the_words_around_a_word():
    model = make()
    ids, bounds = packed()
    places = torch.tensor([0, 3, 9])  # within sequences of 7 and 12 tokens
    labels = torch.stack([ids[1], torch.tensor(-100), ids[10]])
    out = model(ids, cu_seqlens=bounds, max_seqlen=12, labels=labels, masked_positions=places)
    forth, back = model(ids, cu_seqlens=bounds, max_seqlen=12).prediction_logits.double().log_softmax(-1)
    expected = torch.stack([-(forth[0, ids[1]] + forth[9, ids[10]]) / 2, -(back[2, ids[1]] + back[11, ids[10]]) / 2])
    assert_close(out.directions.double(), expected, rtol=0, atol=1e-6)
    assert_close(out.loss, out.directions.mean())
    assert out.hits[0][1] == 4 and out.prediction_logits.shape == (2, 3, 40)
    with pytest.raises(ValueError, match="labels and masked_positions belong together"):
        model(ids, cu_seqlens=bounds, labels=labels)


def test_a_sampled_softmax_is_its_definition_and_moves_no_other_row():
    torch.manual_seed(0)
    words, width, count = 30, 5, 8
    sampling = LogUniform.of(torch.randperm(words), count)
    weight, bias = torch.randn(words, width, requires_grad=True), torch.randn(words, requires_grad=True)
    hidden = [torch.randn(6, width, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([int(sampling.by_rank[0]), 3, 29, -100, 3, 7])
    state = torch.get_rng_state()
    losses = sampled_softmax_loss(hidden, labels, weight, bias, sampling)
    losses.sum().backward()
    torch.set_rng_state(state)
    sampled, tries = sampling.draw()
    assert len(set(sampled.tolist())) == count <= tries

    def corrected(x, word):
        rank = int(sampling.ranks[word])
        p = math.log((rank + 2) / (rank + 1)) / math.log(words + 1)
        return float((x @ weight[word] + bias[word]).detach()) - math.log(1 - (1 - p) ** tries)

    for x, loss in zip(hidden, losses.tolist(), strict=True):
        rows = []
        for row, label in zip(x, labels.tolist(), strict=True):
            if label != -100:
                others = [corrected(row, word) for word in sampled.tolist() if word != label]
                true = corrected(row, label)
                rows.append(math.log(sum(map(math.exp, [true, *others]))) - true)
        assert loss == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    touched = {*sampled.tolist(), *labels[labels >= 0].tolist()}
    for table in (weight, bias):
        assert table.grad.is_sparse and set(table.grad._indices()[0].tolist()) == touched
    with pytest.raises(ValueError, match="sampled must be from 1 to half of the vocabulary of 30"):
        LogUniform.of(torch.arange(words), 16)


def test_samples_are_drawn_as_often_as_expected():
    torch.manual_seed(0)
    sampling = LogUniform.of(torch.arange(20), 5)
    found, expected = torch.zeros(20).double(), torch.zeros(20).double()
    for _ in range(4000):
        ids, tries = sampling.draw()
        found[ids] += 1 / 4000
        expected += sampling.log_expected(torch.arange(20), tries).exp() / 4000
    assert_close(found, expected, rtol=0, atol=0.08)
    assert found.argmax() == 19, "the most frequent"


def test_a_folder_gives_the_same_numbers_and_transformers_refuses_it(tmp_path):
    model = make(projection_size=3)
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9).unsqueeze(0)
    again, bare = ElmoForPreTraining.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert again.config == model.config and type(bare) is ElmoModel
    assert torch.equal(again(ids).prediction_logits, model(ids).prediction_logits)
    assert torch.equal(bare(ids).sequence_output, model.elmo(ids).sequence_output)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="does not hold the ElmoForPreTraining"):
        ElmoForPreTraining.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="projection_size must be below cell_size = 6, or None, got 6"):
        make(projection_size=6)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="fastbert-elmo"):
        transformers.AutoConfig.from_pretrained(tmp_path)
