"""How good a masked language model is on held-out text, beside what token frequencies alone would reach."""

import itertools
import unicodedata
from collections.abc import Iterator

import torch
from tokenizers import decoders
from torch import Tensor

from fastbert.data.batch import Batch
from fastbert.data.batches import PretrainBatches
from fastbert.data.tokenizer import continuations, is_wide, special_ids
from fastbert.models.elmo import ElmoForPreTraining
from fastbert.models.pretraining import Predictions, PreTrainingModel
from fastbert.models.two_streams import UNSEEN
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.pretrain.accuracy import PERPLEXITIES
from fastbert.pretrain.processes import ALONE, Processes

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


def forward(model: PreTrainingModel, batch: Batch) -> Predictions:
    """The model's output for a packed batch, logits and losses; logits are for the batch's own places first."""
    filled = batch
    if batch.input_ids.is_cpu:
        filled = batch.filled(model.config.pad_token_id, longest=model.config.longest)
    first = model.config.first_position
    more = {} if model.sentence_label is None else {model.sentence_label: filled.sentence_label}
    if filled.task_type_ids is not None:
        more["task_type_ids"] = filled.task_type_ids
    if filled.query_ranks is not None:
        more["ranks"] = filled.query_ranks, filled.key_ranks
    return model(
        filled.input_ids, token_type_ids=filled.token_type_ids,
        position_ids=filled.position_ids + first if first else filled.position_ids,
        cu_seqlens=filled.cu_seqlens, max_seqlen=filled.max_seqlen, masked_positions=filled.masked_positions,
        labels=filled.labels, **more,
    )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: PreTrainingModel,
    batches: PretrainBatches,
    count: int,
    frequencies: Frequencies,
    device: str,
    pairs_are: str = "nsp",
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Scores over the first `count` batches (all, where there are fewer), without dropout.

    Each of several processes computes its share of the batches; the scores are of all, and those of one process.

    Returns:
        mlm_loss, frequency_loss (nats per masked token: the model's, and of always predicting token frequencies),
        mlm_accuracy; the same with "rare_" over masked tokens that are rare; nsp_loss and nsp_accuracy, or what
        `pairs_are` in place of "nsp", where the batches have pairs; of an ELMo forward_perplexity and
        backward_perplexity. A mean over nothing is NaN.
    """
    model.eval()
    # per masked token: loss, frequency loss, hit, rare, from which side; per pair: loss, hit
    tokens, pairs = [torch.empty(0, 5, dtype=torch.float64)], []
    count = min(count, len(batches))
    own = processes.share(count)
    for place in range(-(-count // processes.count)):  # as many passes in each: a split model needs all of them in each
        is_own = place < len(own)
        batch = batches[own[place] if is_own else 0].to(device)
        out = forward(model, batch)
        if not is_own:
            continue
        masked, sequences = len(batch.labels), len(batch.cu_seqlens) - 1
        logits = out.prediction_logits[..., :masked, :]
        sides = logits.shape[0] if logits.dim() == 3 else 1  # an ELMo predicts each word from two
        labels, logits = batch.labels.repeat(sides), logits.flatten(0, -2)
        loss = cross_entropy(logits, labels, reduction="none").double().cpu()
        hit = (logits.argmax(-1) == labels).double().cpu()
        label, side = labels.cpu(), torch.arange(sides).repeat_interleave(masked)
        tokens.append(torch.stack([loss, -frequencies.log_probability[label], hit, frequencies.rare[label], side], 1))
        if batch.sentence_label is not None:
            logits = out.sentence_logits[:sequences]
            loss = cross_entropy(logits, batch.sentence_label, reduction="none")
            hit = logits.argmax(-1) == batch.sentence_label
            pairs.append(torch.stack([loss.double().cpu(), hit.double().cpu()], 1))
    table = torch.cat(list(itertools.chain(*processes.gathered(tokens))))
    names = "mlm_loss", "frequency_loss", "mlm_accuracy"
    scores = dict(zip(names, table[:, :3].mean(0).tolist(), strict=True))
    rare = table[table[:, 3] == 1, :3].mean(0).tolist()
    scores |= {f"rare_{name}": value for name, value in zip(names, rare, strict=True)}
    if isinstance(model, ElmoForPreTraining):
        losses = [table[table[:, 4] == side, 0].mean() for side in range(2)]
        scores |= {name: loss.exp().item() for name, loss in zip(PERPLEXITIES, losses, strict=True)}
    pairs = list(itertools.chain(*processes.gathered(pairs)))
    if pairs:
        scores |= dict(
            zip((f"{pairs_are}_loss", f"{pairs_are}_accuracy"), torch.cat(pairs).mean(0).tolist(), strict=True)
        )
    return scores


@torch.no_grad()
def guesses(model: PreTrainingModel, batches: PretrainBatches, tokenizer, device: str, count: int = 6) -> str:
    """In `count` held-out sequences one masked word (or one that came next), and the five best guesses at it."""
    model.eval()
    behind = int(model.config.is_decoder)  # what a decoder says of a token it says at the one before
    mask, continues = special_ids(tokenizer).mask, torch.from_numpy(continuations(tokenizer))
    lines = []
    for ids, types, place in itertools.islice(_masked_words(batches, tokenizer, continues, behind), count):
        truth, types = int(ids[place]), {name: x.to(device) for name, x in types.items()}
        best = model.word_logits(ids.to(device), place, mask, **types).float().softmax(-1).topk(5)
        whole = [*(~continues[ids]).tolist(), True]  # where a word may be cut
        start = next(i for i in range(max(0, place - 14), -1, -1) if whole[i])
        end = next(i for i in range(min(place + 10, len(ids)), len(whole)) if whole[i])
        before, after = (_readable(tokenizer.decode(x.tolist())) for x in (ids[start:place], ids[place + 1 : end]))
        words = [f"{_bare(tokenizer, i)} {p:.0%}" for p, i in zip(*(x.tolist() for x in best), strict=True)]
        lines.append(f"  ... {before} [{_bare(tokenizer, truth)}] {after} ...\n      {', '.join(words)}")
    return "\n".join(["\nguesses on held-out text", *(lines or ["  none: no whole word of it is masked"])])


def _masked_words(
    batches: PretrainBatches, tokenizer, continues: Tensor, behind: int
) -> Iterator[tuple[Tensor, dict[str, Tensor], int]]:
    """Of each sequence that has one: its ids [T] before masking, its types [T] by name, and the place of a masked word.

    Labels belong `behind` the places where they are predicted; the last word is taken then, which most others precede.
    """
    for batch in (batches[i] for i in range(min(len(batches), 32))):
        original = batch.input_ids.clone()
        predicted = batch.masked_positions + behind
        original[predicted] = batch.labels
        content = torch.ones_like(original, dtype=torch.bool)
        if batch.key_ranks is not None:
            content = batch.key_ranks != UNSEEN  # queries stand behind the tokens of their sequence
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            own = (predicted >= start) & (predicted < end)
            places = batch.position_ids[predicted[own]].tolist()
            stop = start + int(content[start:end].sum())
            ids = original[start:stop].clone()
            place = _whole_word(ids, places[::-1] if behind else places, tokenizer, continues)
            if place is not None:
                types = {"token_type_ids": batch.token_type_ids, "task_type_ids": batch.task_type_ids}
                yield ids, {name: x[start:stop] for name, x in types.items() if x is not None}, place


def _whole_word(ids: Tensor, places: list[int], tokenizer, continues: Tensor) -> int | None:
    """The first of `places` whose token is a word of letters in one piece."""
    part = continues[ids].tolist()
    for place in places:
        if _is_word(_bare(tokenizer, int(ids[place]))) and not (part[place] or part[place + 1]):
            return place
    return None


def _bare(tokenizer, i: int) -> str:
    """A token as text; without the mark that Unigram and BPE have at a word's beginning, if there is more of it."""
    piece = tokenizer.id_to_token(i)
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        return tokenizer.decode([i], skip_special_tokens=False).strip() or piece
    return piece.removeprefix("▁") or piece


def _is_word(token: str) -> bool:
    """Letters and their marks: four or more, or wide ones (Chinese, Korean), of which one is a word or syllable."""
    letters = all(unicodedata.category(character)[0] in "LM" for character in token)
    return letters and (len(token) > 3 or all(is_wide(character) for character in token))


def _readable(text: str) -> str:
    """Without the spaces between wide characters, each of which is a token of its own."""
    text = text.strip()
    neighbours = zip(f" {text}", text, f"{text[1:]} ", strict=False)
    return "".join(
        here for before, here, after in neighbours if here != " " or not (is_wide(before) and is_wide(after))
    )
