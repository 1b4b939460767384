"""Dynamic masking for masked-language modelling, a pure function of (seed, epoch, sample, place).

Of the n tokens of a sample that are not special exactly max(1, round(0.15 n)) are chosen; of these 80 % become [MASK],
10 % a random token, 10 % stay. Source: Devlin et al., "BERT" (2019), and its `create_pretraining_data.py`; drawn anew
every epoch as in Liu et al., "RoBERTa" (2019).
"""

import numpy as np

from fastbert.data.draws import Purpose, below, draw
from fastbert.data.tokenizer import SpecialIds


def mask_tokens(
    input_ids: np.ndarray,
    cu_seqlens: np.ndarray,
    samples: np.ndarray,
    special: SpecialIds,
    vocab_size: int,
    *,
    seed: int,
    epoch: int,
    mask_prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks a packed batch of B samples with T tokens, all samples at once.

    A sample's masks depend on (seed, epoch, its number, its tokens), not on its neighbours in the batch.

    Args:
        input_ids: int64 [T].
        cu_seqlens: integers [B + 1], sample b is input_ids[cu_seqlens[b] : cu_seqlens[b + 1]], none empty.
        samples: int64 [B], the samples' numbers.
        special: ids that are never chosen and never the random token.
        mask_prob: share of tokens to choose.
        mask_share, random_share: shares of the chosen that become [MASK] and a random token.

    Returns:
        New ids int64 [T]; the chosen positions int64 [M], ascending; the original ids there, int64 [M].
    """
    lengths = np.diff(cu_seqlens)
    sample = np.repeat(np.arange(len(samples)), lengths)
    place = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    keys, actions, replacements, _ = draw(Purpose.MASK, seed, epoch, samples[sample], place)

    is_special = np.zeros(vocab_size, bool)
    is_special[list(special)] = True
    fixed = is_special[input_ids]
    n = lengths - np.add.reduceat(fixed, cu_seqlens[:-1], dtype=np.int64)
    chosen_per_sample = np.minimum(n, np.maximum(1, np.rint(n * mask_prob))).astype(np.int64)

    # Within each sample the free tokens come first, in random order; the first few are chosen.
    order = np.argsort((sample << 33) | (fixed.astype(np.int64) << 32) | keys, kind="stable")
    positions = np.sort(order[place < chosen_per_sample[sample]])

    labels = input_ids[positions]
    action = actions[positions] / 2.0**32
    random_ids = below(replacements[positions], vocab_size - len(set(special)))
    for i in sorted(set(special)):
        random_ids += random_ids >= i
    masked = input_ids.copy()
    masked[positions] = np.select(
        [action < mask_share, action < mask_share + random_share], [special.mask, random_ids], labels
    )
    return masked, positions, labels
