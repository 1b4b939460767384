"""Several documents in a row (RoBERTa's FULL-SENTENCES) see nothing of each other, in every model and dtype."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import AlbertConfig, BertConfig, ErnieConfig, RobertaConfig
from fastbert.data import PretrainBatches, SpecialIds, TokenStore
from fastbert.models.auto import ENCODERS

V, LONGEST, DOCUMENTS = 64, 40, 24
SIZES = {
    "vocab_size": V, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "initializer_range": 0.2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SIZES, max_position_embeddings=LONGEST),
    "albert": AlbertConfig(**SIZES, embedding_size=16, max_position_embeddings=LONGEST),
    "ernie": ErnieConfig(**SIZES, max_position_embeddings=LONGEST),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=LONGEST + 2, pad_token_id=1),
}
FORMS = {
    "float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """A batch of documents of 1 to 30 tokens, several in a row of 40."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 31, DOCUMENTS)
    bounds = np.append(0, np.cumsum(lengths))
    text = draw.integers(5, V, bounds[-1]).astype(np.uint16)
    store = TokenStore(Path("memory"), text, bounds, np.arange(DOCUMENTS + 1), V, "")
    batches = PretrainBatches(
        store, SpecialIds(pad=1, unk=0, cls=2, sep=3, mask=4), seq_len=LONGEST, batch_tokens=1024, seed=0,
        objective="mlm", inputs="full-sentences",
    )  # fmt: skip
    batch = batches[0]
    assert len(batches) == 1 and len(batch.cu_seqlens) > DOCUMENTS > batches.count, "a row has several documents"
    return batch


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_document_changes_and_the_others_keep_their_bits(rows, kind, form, training):
    dtype, autocast = FORMS[form]
    torch.manual_seed(0)
    model = ENCODERS[kind](CONFIGS[kind]).to(dtype).train(training)

    def outputs(ids):
        torch.manual_seed(1)  # dropout's
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = model(ids, cu_seqlens=rows.cu_seqlens, max_seqlen=rows.max_seqlen)
        return made.sequence_output, made.pooled_output

    bounds = rows.cu_seqlens.tolist()
    before, pooled_before = outputs(rows.input_ids)
    for changed in (0, 7, DOCUMENTS - 1):
        a, b = bounds[changed], bounds[changed + 1]
        ids = rows.input_ids.clone()
        ids[a + 1 : b - 1] = 5 + (ids[a + 1 : b - 1] + 11) % (V - 5)
        after, pooled = outputs(ids)
        others = torch.ones(len(ids), dtype=torch.bool)
        others[a:b] = False
        assert torch.equal(after[others], before[others])
        assert (after[a:b] != before[a:b]).any(-1).all(), "each of its own tokens sees it"
        alike = (pooled == pooled_before).all(-1)
        assert not alike[changed] and alike.sum() == len(alike) - 1
