"""A padded batch with `perm_mask` and `target_mapping`, as `transformers` has it, as one longer batch with ranks.

Behind the tokens of each sequence stand its queries. Ranks say who sees whom: a key whose rank is at most the query's.
They can say what every order can, namely that of any two rows of the mask one allows all that the other allows; then
the more rows see a key the lower is its rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.ops.checks import check_tensor

UNSEEN = 2**31 - 1  # the key rank of a query: no token sees it
NOTHING = -(2**31)  # the query rank of what sees nothing


class TwoStreams(NamedTuple):
    """B sequences of S tokens and P queries each, P being 0 without `target_mapping`.

    Attributes:
        input_ids, attention_mask, position_ids: int64 [B, S + P]; the ids of queries mean nothing.
        token_type_ids: likewise, or None.
        query_ranks, key_ranks: int32 [B, S + P].
        places: int64 [B * P], where the queries are in the batch read as [B * (S + P)]; None without.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor
    query_ranks: Tensor
    key_ranks: Tensor
    places: Tensor | None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        perm_mask: Tensor | None,
        target_mapping: Tensor | None,
    ) -> "TwoStreams":
        """Looks at the masks, so on a GPU it waits for the device.

        Raises:
            ValueError, TypeError: shapes that do not fit, a row of `target_mapping` that is not of one place, and a
                `perm_mask` that no order gives.
        """
        for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if x is not None:
                check_tensor(name, x)
                if x.dim() != 2 or x.shape != input_ids.shape:
                    raise ValueError(f"{name} must be [B, S], with perm_mask and target_mapping, got {list(x.shape)}")
        (batch, size), device = input_ids.shape, input_ids.device
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        allowed = real[:, None, :].expand(batch, size, size)  # [B, S, S], query and key
        if perm_mask is not None:
            _check_mask("perm_mask", perm_mask, (batch, size, size))
            allowed = allowed & (perm_mask == 0)
        place, aimed = _targets(target_mapping, batch, size, device)

        itself = torch.eye(size, dtype=torch.bool, device=device)
        content = (allowed | itself) & real[:, None, :] & real[:, :, None]
        queries = allowed.gather(1, place[..., None].expand(-1, -1, size)) & aimed[..., None]  # [B, P, S]
        query_ranks, key_ranks = ranks_of(torch.cat([content, queries], 1))

        def extended(x: Tensor, behind: Tensor) -> Tensor:
            return torch.cat([x, behind], 1)

        places = torch.arange(size, device=device).expand(batch, size)
        whole = torch.arange(batch * (size + place.shape[1]), device=device).view(batch, -1)
        return cls(
            input_ids=extended(input_ids, input_ids.gather(1, place)),
            attention_mask=extended(real.long(), torch.ones_like(place)),
            token_type_ids=None
            if token_type_ids is None
            else extended(token_type_ids, token_type_ids.gather(1, place)),
            position_ids=extended(places, place),
            query_ranks=query_ranks,
            key_ranks=extended(key_ranks, torch.full_like(place, UNSEEN, dtype=torch.int32)),
            places=None if target_mapping is None else whole[:, size:].flatten(),
        )

    def by_sequence(self, x: Tensor) -> Tensor:
        """What was computed at `places`, [B * P, N] -> [B, P, N]; without places x as it is."""
        return x if self.places is None else x.view(len(self.input_ids), -1, x.shape[1])


def ranks_of(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks that say what a mask says: bool [B, R, S], whether a row sees a key -> int32 [B, R] and [B, S].

    Raises:
        ValueError: two rows of which neither allows all that the other allows.
    """
    key_ranks = -visible.sum(1, dtype=torch.int32)
    query_ranks = torch.where(visible, key_ranks[:, None, :], NOTHING).amax(2)
    said = (key_ranks[:, None, :] <= query_ranks[..., None]) & (key_ranks[:, None, :] < 0)
    if not torch.equal(said, visible):
        raise ValueError(
            "perm_mask must be that of an order: of any two tokens or queries of a sequence one sees all that the other"
            " sees. This batch's is not, and attention here has no other masks: make it of permutation numbers, "
            "perm_mask[b, i, j] = number[b, i] <= number[b, j], with -1 for what is never predicted"
        )
    return query_ranks, key_ranks


def _targets(target_mapping: Tensor | None, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [B, P], the place of each query; and whether it has one, bool [B, P]."""
    if target_mapping is None:
        return torch.zeros(batch, 0, dtype=torch.int64, device=device), torch.zeros(
            batch, 0, dtype=torch.bool, device=device
        )
    _check_mask("target_mapping", target_mapping, (batch, None, size))
    ones = (target_mapping != 0).sum(2)
    if (ones > 1).any() or ((target_mapping != 0) & (target_mapping != 1)).any():
        raise ValueError("target_mapping must have at most one 1 in each row, and 0 elsewhere: a query has one place")
    return target_mapping.argmax(2), ones == 1


def _check_mask(name: str, mask: Tensor, shape: tuple[int | None, ...]) -> None:
    check_tensor(name, mask)
    if mask.dim() != 3 or any(wanted not in (None, got) for wanted, got in zip(shape, mask.shape, strict=True)):
        wanted = ", ".join("P" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be [{wanted}] for this batch, got {list(mask.shape)}")
