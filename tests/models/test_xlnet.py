"""XLNet: the numbers of transformers, with and without an order, folders both ways, and what an order hides."""

import dataclasses

import pytest
import torch
from bert_batches import unsettled
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert import AutoModel, XLNetConfig, XLNetLMHeadModel, XLNetModel
from fastbert.models.relative import Relative, RelativeAttention, widened
from fastbert.models.two_streams import UNSEEN, ranks_of

B, S, P, V = 3, 12, 4, 50
CONFIG = XLNetConfig(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unsettled(XLNetLMHeadModel(CONFIG).eval())


@pytest.fixture
def theirs(transformers, model, tmp_path):
    model.save_pretrained(tmp_path)
    other, report = transformers.XLNetLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    return other


def batch(padding: str) -> dict[str, Tensor]:
    """Sequences of 12, 7 and 3 tokens in three segments, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, V, (B, S), generator=generator)
    mask = (torch.arange(S) < torch.tensor([[S], [7], [3]])).long()
    types = (torch.arange(S) // 5).expand(B, S)
    made = {"input_ids": torch.where(mask == 1, ids, 5), "attention_mask": mask, "token_type_ids": types}
    return {name: x.flip(1).contiguous() for name, x in made.items()} if padding == "left" else made


def order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation number for every third token of each sequence, -1 for the others; perm_mask [B, S, S]."""
    number = torch.full((B, S), -1)
    for row, real in enumerate(mask):
        aimed = real.nonzero().squeeze(1)[1::3]
        number[row, aimed] = torch.randperm(len(aimed), generator=torch.Generator().manual_seed(row))
    return number, ((number[:, :, None] <= number[:, None, :]) & (number[:, None, :] >= 0)).float()


def mapping(number: Tensor) -> Tensor:
    """A row for each of P queries; rows of zeros behind those that there are."""
    made = torch.zeros(B, P, S)
    for row, numbers in enumerate(number):
        places = (numbers >= 0).nonzero().squeeze(1)
        made[row, torch.arange(len(places)), places] = 1.0
    return made


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["plain", "order", "queries", "order and queries"])
@torch.no_grad()
def test_transformers_gives_the_same_numbers(model, theirs, padding, kind):
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    number, perm_mask = order(real)
    more = {"perm_mask": perm_mask} if "order" in kind else {}
    if "queries" in kind:
        more["target_mapping"] = mapping(number)
        real = more["target_mapping"].sum(2) > 0
        labels = torch.randint(6, V, (B, P)).masked_fill(~real, -100)
    else:
        labels = torch.where(real, inputs["input_ids"], -100)
    expected = theirs(**inputs, **more, labels=labels)
    logits = model(**inputs, **more).logits
    assert expected.logits[real].std() > 0.1, "the numbers are too alike to tell two models apart"
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**inputs, **more, labels=labels).loss, expected.loss, rtol=0, atol=1e-4)
    hidden = model.base_model(**inputs, **more).last_hidden_state
    wanted = theirs.transformer(**inputs, **more).last_hidden_state
    torch.testing.assert_close(hidden[real], wanted[real], rtol=0, atol=1e-4)


def test_folders_of_transformers_are_read(transformers, model, tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2}
    other = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes, dropout=0.2, ff_activation="gelu_new"))
    other.eval().save_pretrained(tmp_path)
    ours = XLNetLMHeadModel.from_pretrained(tmp_path)
    assert ours.config == dataclasses.replace(
        CONFIG, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, hidden_act="gelu_new"
    )
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits[real], other(**inputs).logits[real], rtol=0, atol=1e-4)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is XLNetModel and torch.equal(encoder.embeddings.mask_emb, ours.base_model.embeddings.mask_emb)
    for field, value in (("attn_type", "uni"), ("bi_data", True), ("clamp_len", 5)):
        other.config.update({field: value})
        other.config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"says {field} = .*; this XLNET has {field} = .* only"):
            AutoModel.from_pretrained(tmp_path)
        other.config.update({"attn_type": "bi", "bi_data": False, "clamp_len": -1})


def test_other_configurations_are_refused():
    for changed, says in (
        ({"is_decoder": True}, "an XLNet has is_decoder = False only, got True"),
        ({"attention_window": 8}, "an XLNet has attention_window = None only"),
        ({"norm": "group"}, "an XLNet has norm = 'layer' only"),
        ({"max_position_embeddings": 512}, "an XLNet has no max_position_embeddings: leave it out, got 512"),
        ({"hidden_dropout_prob": 0.0}, "one probability of dropout"),
        ({"hidden_size": 33, "num_attention_heads": 3}, "hidden_size must be even"),
    ):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(CONFIG, **changed)


def packed(lengths: list[int], targets: list[list[int]]) -> dict:
    """A packed batch in segments with queries for the targets, which are in the order that they are predicted in."""
    generator, rows = torch.Generator().manual_seed(2), []
    for size, order in zip(lengths, targets, strict=True):
        number = torch.full((size,), -1)
        number[order] = torch.arange(len(order))
        place = torch.cat([torch.arange(size), torch.tensor(order, dtype=torch.int64)])
        ranks = torch.cat([number, number[order] - 1]), torch.cat([number, torch.full((len(order),), UNSEEN)])
        rows.append((torch.randint(6, V, (len(place),), generator=generator), place // 3, place, *ranks))
    ids, types, places, query_ranks, key_ranks = map(torch.cat, zip(*rows, strict=True))
    ends = torch.tensor([len(row[0]) for row in rows]).cumsum(0)
    return {
        "input_ids": ids, "token_type_ids": types, "position_ids": places,
        "ranks": (query_ranks.int(), key_ranks.int()), "cu_seqlens": F.pad(ends, (1, 0)).int(),
        "max_seqlen": int(ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).max()),
        "masked_positions": (key_ranks == UNSEEN).nonzero().squeeze(1),
    }  # fmt: skip


@torch.no_grad()
def test_a_prediction_is_of_what_comes_before_it_alone(model):
    """Whatever stands at a target changes the predictions behind it in the order, and no other."""
    order = [7, 2, 5, 3]
    inputs = packed([9, 4], [order, [1]])
    before = model(**inputs).logits
    for step, place in enumerate(order):
        ids = inputs["input_ids"].clone()
        ids[place] = (ids[place] + 1) % V
        changed = (model(**inputs | {"input_ids": ids}).logits != before).any(1).tolist()
        assert changed == [later > step for later in range(len(order))] + [False]
    ids = inputs["input_ids"].masked_fill(inputs["ranks"][1] == UNSEEN, 7)
    assert torch.equal(model(**inputs | {"input_ids": ids}).logits, before), "a query's own id means nothing"


@torch.no_grad()
def test_forms_of_a_batch_agree(model):
    """Packed with ranks, and padded with the masks of transformers; each sequence alone too."""
    inputs = packed([9, 4], [[7, 2, 5, 3], [1]])
    key_ranks, expected, found = inputs["ranks"][1], model(**inputs).logits, []
    for start, end in ((0, 13), (13, 18)):
        is_query = key_ranks[start:end] == UNSEEN
        content, places = ~is_query, inputs["position_ids"][start:end][is_query]
        number = key_ranks[start:end][content]
        ids, types = (inputs[name][start:end][content][None] for name in ("input_ids", "token_type_ids"))
        found.append(model(
            ids, token_type_ids=types,
            perm_mask=((number[:, None] <= number) & (number >= 0))[None],
            target_mapping=F.one_hot(places, len(number))[None],
        ).logits[0])  # fmt: skip
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-5)
    shifted = inputs | {"position_ids": inputs["position_ids"] + 40}
    with pytest.raises(ValueError, match=r"position_ids must be below max_seqlen = 13 .* got 48"):
        model(**shifted)
    shifted["max_seqlen"] = 49  # more places than the model is wide: by sinusoids
    moved = model(**shifted).logits
    assert torch.allclose(moved, expected, rtol=0, atol=1e-5), "differences of places are all that counts"


def test_masks_that_no_order_gives_are_refused(model):
    ids, none = torch.full((1, 3), 7), torch.zeros(1, 3, 3)
    crossed = none.clone()
    crossed[0, 0, 1] = crossed[0, 1, 0] = 1.0  # two that do not see each other, each of which sees itself
    with pytest.raises(ValueError, match="perm_mask must be that of an order"):
        model(ids, perm_mask=crossed)
    for mapping_, says in (
        (torch.ones(1, 1, 3), "target_mapping must have at most one 1 in each row"),
        (torch.full((1, 1, 3), 0.3), "target_mapping must have at most one 1 in each row"),
        (torch.zeros(1, 2, 4), r"target_mapping must be \[1, P, 3\] for this batch, got \[1, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=says):
            model(ids, target_mapping=mapping_)
    with pytest.raises(ValueError, match=r"perm_mask must be \[1, 3, 3\] for this batch, got \[3, 3\]"):
        model(ids, perm_mask=none[0])
    with pytest.raises(ValueError, match="are of padded batches"):
        model(ids, perm_mask=none, position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match=r"query_ranks must be int32 \[1, 3\], got torch.int64"):
        model(ids, ranks=(ids, ids))


def test_ranks_say_every_order():
    """Nested rows, in any arrangement, come back from their ranks; of crossed ones it is said that they cannot."""
    generator = torch.Generator().manual_seed(3)
    for size in range(1, 9):
        threshold, rank = (torch.randint(0, 4, (5, size), generator=generator) for _ in range(2))
        visible = rank[:, None, :] <= threshold[:, :, None] - 1  # [5, size, size]; a row may see nothing
        query_ranks, key_ranks = ranks_of(visible)
        # A key that nobody sees has no rank below it.
        assert torch.equal((key_ranks[:, None, :] <= query_ranks[:, :, None]), visible)
    with pytest.raises(ValueError, match="perm_mask must be that of an order"):
        ranks_of(torch.eye(2, dtype=torch.bool)[None])


def scores_of(module: RelativeAttention, q: Tensor, k: Tensor, place: Tensor, segment: Tensor) -> Tensor:
    """The formula, term by term: [N, S, S]."""
    half = module.r.shape[0] // 2
    angle = (place[:, None] - place[None, :])[..., None] / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
    r = torch.einsum("ijh,hnd->ijnd", torch.cat([angle.sin(), angle.cos()], -1), module.r)
    by_segment = module.seg_embed[(segment[:, None] != segment[None, :]).long()]  # [S, S, N, D]
    return (
        torch.einsum("ind,jnd->nij", q + module.r_w_bias, k)
        + torch.einsum("ind,ijnd->nij", q + module.r_r_bias, r)
        + torch.einsum("ind,ijnd->nij", q + module.r_s_bias, by_segment)
    )


@pytest.mark.parametrize(("end", "columns"), [(101, 4 + 8 + 8), (7, 4 + 7 + 8)], ids=["sinusoids", "places"])
def test_wider_queries_and_keys_give_the_scores_of_the_formula(end, columns):
    """But for what is the same for all keys of a query; and the gradients, in float64."""
    torch.manual_seed(4)
    module = RelativeAttention(8, 2).double()
    for param in module.own_parameters():
        torch.nn.init.normal_(param)
    q, k = (torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    place, segment = torch.tensor([0, 1, 2, 6, 4, end - 1]), torch.tensor([0, 0, 7, 7, 1, 0])
    relative = Relative.of(place, segment, None, end, 8, torch.float64)
    leaves = [q, k, *module.own_parameters()]

    wide_q, wide_k = widened(q, k, module, relative)
    assert wide_q.shape == wide_k.shape == (6, 2, columns)
    ours = torch.einsum("inw,jnw->nij", wide_q, wide_k).softmax(-1)
    truth = scores_of(module, q, k, place, segment).softmax(-1)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(truth)
    for got, wanted in zip(*(torch.autograd.grad((p * weights).sum(), leaves) for p in (ours, truth)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_a_backward_pass_reaches_every_parameter(model):
    with fastbert.use_backend("reference"):
        inputs = packed([9, 4], [[7, 2, 5, 3], [1]])
        loss = model(**inputs, labels=torch.full((5,), 9)).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in gradients)
