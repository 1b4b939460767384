"""How good a masked language model is on held-out text, beside what token frequencies alone would reach."""

import itertools

import torch
from torch import Tensor

from fastbert.bert import BertForPreTraining, BertForPreTrainingOutput
from fastbert.data.batches import Batch, PretrainBatches
from fastbert.ops.cross_entropy import cross_entropy

RARE_SHARE = 0.1  # the rarest words that together make up this share of the training text


class Frequencies:
    """The training text's token frequencies: the simplest model there is, and which words are rare.

    Args:
        counts: [V] occurrences of every token in the training text; one is added to each, so that none is impossible.
    """

    def __init__(self, counts: Tensor):
        smoothed = counts.double() + 1
        self.log_probability = (smoothed / smoothed.sum()).log()  # [V]
        ascending = counts.argsort(stable=True)
        rare = counts[ascending].cumsum(0) <= RARE_SHARE * counts.sum()
        self.rare = torch.zeros(len(counts), dtype=torch.bool)
        self.rare[ascending[rare]] = True


def forward(model: BertForPreTraining, batch: Batch) -> BertForPreTrainingOutput:
    """The model's output for a packed batch, logits and losses; logits are for the batch's own places first."""
    filled = batch.filled(model.config.pad_token_id, longest=model.config.max_position_embeddings)
    return model(
        filled.input_ids, token_type_ids=filled.token_type_ids, position_ids=filled.position_ids,
        cu_seqlens=filled.cu_seqlens, max_seqlen=filled.max_seqlen, masked_positions=filled.masked_positions,
        labels=filled.labels, next_sentence_label=filled.next_sentence_label,
    )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: BertForPreTraining, batches: PretrainBatches, count: int, frequencies: Frequencies, device: str
) -> dict[str, float]:
    """Scores over the first `count` batches (all, where there are fewer), without dropout.

    Returns:
        mlm_loss, frequency_loss (nats per masked token: the model's, and of always predicting token frequencies),
        mlm_accuracy; the same with "rare_" over masked tokens that are rare; nsp_loss and nsp_accuracy where the
        batches have pairs. A mean over nothing is NaN.
    """
    model.eval()
    tokens, pairs = [], []  # per masked token: loss, frequency loss, hit, rare; per pair: loss, hit
    for batch in itertools.islice((batches[i] for i in range(len(batches))), count):
        batch = batch.to(device)
        out = forward(model, batch)
        masked, sequences = len(batch.labels), len(batch.cu_seqlens) - 1
        logits = out.prediction_logits[:masked]
        loss = cross_entropy(logits, batch.labels, reduction="none").double().cpu()
        hit = (logits.argmax(-1) == batch.labels).double().cpu()
        label = batch.labels.cpu()
        tokens.append(torch.stack([loss, -frequencies.log_probability[label], hit, frequencies.rare[label]], 1))
        if batch.next_sentence_label is not None:
            logits = out.seq_relationship_logits[:sequences]
            loss = cross_entropy(logits, batch.next_sentence_label, reduction="none")
            hit = logits.argmax(-1) == batch.next_sentence_label
            pairs.append(torch.stack([loss.double().cpu(), hit.double().cpu()], 1))
    table = torch.cat(tokens)
    names = "mlm_loss", "frequency_loss", "mlm_accuracy"
    scores = dict(zip(names, table[:, :3].mean(0).tolist(), strict=True))
    rare = table[table[:, 3] == 1, :3].mean(0).tolist()
    scores |= {f"rare_{name}": value for name, value in zip(names, rare, strict=True)}
    if pairs:
        scores |= dict(zip(("nsp_loss", "nsp_accuracy"), torch.cat(pairs).mean(0).tolist(), strict=True))
    return scores


@torch.no_grad()
def guesses(model: BertForPreTraining, batches: PretrainBatches, tokenizer, device: str, count: int = 6) -> str:
    """Fill-mask on held-out text: in `count` sequences one masked word, what stood there, and the five best guesses."""
    model.eval()
    mask = tokenizer.token_to_id("[MASK]")
    batch: Batch = batches[0]
    original = batch.input_ids.clone()
    original[batch.masked_positions] = batch.labels
    bounds = batch.cu_seqlens.tolist()
    lines = ["\nguesses on held-out text"]
    for start, end in itertools.pairwise(bounds):
        ids = original[start:end].clone()
        place = _whole_word(ids, [p - start for p in batch.masked_positions.tolist() if start <= p < end], tokenizer)
        if place is None:
            continue
        truth, ids[place] = int(ids[place]), mask
        out = model(ids.unsqueeze(0).to(device), token_type_ids=batch.token_type_ids[start:end].unsqueeze(0).to(device))
        best = out.prediction_logits[0, place].float().softmax(-1).topk(5)
        before = tokenizer.decode(ids[max(0, place - 14) : place].tolist())
        after = tokenizer.decode(ids[place + 1 : place + 10].tolist())
        words = [f"{tokenizer.id_to_token(i)} {p:.0%}" for p, i in zip(*(x.tolist() for x in best), strict=True)]
        lines.append(f"  ... {before} [{tokenizer.id_to_token(truth)}] {after} ...\n      {', '.join(words)}")
        if len(lines) > count:
            break
    return "\n".join(lines)


def _whole_word(ids: Tensor, places: list[int], tokenizer) -> int | None:
    """The first of `places` whose token is a word of letters in one piece."""
    for place in places:
        token, following = (tokenizer.id_to_token(int(ids[p])) for p in (place, place + 1))
        if token.isalpha() and len(token) > 3 and not following.startswith("##"):
            return place
    return None
