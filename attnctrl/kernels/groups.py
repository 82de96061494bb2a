"""Token groups: the structured mask. A query sees a key when they share a group; no array is queries x keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from attnctrl.kernels.padding import padded

MAX_GROUPS = 64
"""The bits of an int64."""


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Which keys each query sees: those with (query_bits & key_bits) != 0.

    query_bits: int64 (batch or 1, queries); key_bits: int64 (batch or 1, keys); bit g stands for group g, so there
    are at most 64 groups, which may overlap. The two sides are separate: a rule that holds one way sets a bit on one
    side only, and a key that nobody may see (text padding) has no bits. A query that shares no group with any key
    sees nothing: its output is 0 and its log-sum-exp -inf, in every form of the attention.

    The tensors must not be written to later: tile lists and the like are derived once and kept with the mask.

    Raises:
        ValueError: the bits are not int64, not (batch, tokens), or the two sides do not fit together.
    """

    query_bits: torch.Tensor
    key_bits: torch.Tensor
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What the kernels derived from the bits, by a key of their own."""

    def __post_init__(self) -> None:
        for name, bits in (("query_bits", self.query_bits), ("key_bits", self.key_bits)):
            if bits.dtype != torch.int64:
                raise ValueError(f"{name} is {bits.dtype}: group bits are int64, one bit per group.")
            if bits.dim() != 2 or 0 in bits.shape:
                raise ValueError(f"{name} has shape {tuple(bits.shape)}: it must be (batch or 1, tokens), not empty.")
        if self.query_bits.device != self.key_bits.device:
            raise ValueError(f"query_bits is on {self.query_bits.device}, key_bits on {self.key_bits.device}.")
        batches = {self.query_bits.shape[0], self.key_bits.shape[0]} - {1}
        if len(batches) > 1:
            raise ValueError(f"query_bits and key_bits are for batches of {sorted(batches)}: give one size, or 1.")

    @classmethod
    def from_members(cls, queries: torch.Tensor, keys: torch.Tensor | None = None) -> TokenGroups:
        """Groups from bool (batch or 1, tokens, groups): whether a token is in a group; keys default to queries.

        Raises:
            ValueError: not bool, not three axes, more than 64 groups, or other groups for keys than for queries.
        """
        keys = queries if keys is None else keys
        if queries.shape[-1] != keys.shape[-1]:
            raise ValueError(f"Queries have {queries.shape[-1]} groups, keys {keys.shape[-1]}: they must be the same.")
        return cls(pack(queries), pack(keys))

    @classmethod
    def everything(cls, queries: int, keys: int, device: torch.device | str = "cpu") -> TokenGroups:
        """The mask that hides nothing."""
        return cls(*(torch.ones(1, tokens, dtype=torch.int64, device=device) for tokens in (queries, keys)))

    @property
    def batch(self) -> int:
        """The batch that the mask is for; 1 fits any."""
        return max(self.query_bits.shape[0], self.key_bits.shape[0])

    @property
    def queries(self) -> int:
        return self.query_bits.shape[1]

    @property
    def keys(self) -> int:
        return self.key_bits.shape[1]

    @property
    def device(self) -> torch.device:
        return self.query_bits.device

    def to(self, device: torch.device | str) -> TokenGroups:
        """The same mask on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        return TokenGroups(self.query_bits.to(device), self.key_bits.to(device))

    def hide_keys(self, hidden: torch.Tensor) -> TokenGroups:
        """The mask without the keys where `hidden`, bool (batch or 1, keys), is true: for text padding."""
        return TokenGroups(self.query_bits, self.key_bits.masked_fill(hidden.to(self.device), 0))

    def padded(self, padding: torch.Tensor) -> TokenGroups:
        """The mask without the keys that a model's own padding mask hides.

        padding: (batch or 1, 1, 1, keys), bool (True = visible) or additive, hiding at HIDDEN or below. A model hands
        the same tensor to every layer of a step, so the last result serves for as long as the padding is the same
        memory, not written to since. The last padding is kept with it, lest its memory be used again.

        Raises:
            ValueError: an additive padding that does more than hide. To see that, a new one is read, and waited for.
        """
        return padded(self.memo, padding, self.hide_keys)

    def visible(self, keys: torch.Tensor | slice) -> torch.Tensor:
        """Which of some keys, given by index, each query sees: bool (batch or 1, 1, queries, chosen keys)."""
        return ((self.query_bits[:, :, None] & self.key_bits[:, None, keys]) != 0)[:, None]

    def dense(self) -> torch.Tensor:
        """The mask as bool (batch or 1, 1, queries, keys), for the reference path."""
        return self.visible(slice(None))

    def __and__(self, other: TokenGroups) -> TokenGroups:
        """The mask that allows what both allow, exactly.

        A pair is allowed by both when it shares a group (i, j) of the product: i of this mask, j of the other. The
        64 bits hold the product when few groups are in use. Where that is too many, all tokens with the same bits in
        both masks act alike, so that one group per distinct query (seen by the keys it may see), or one per distinct
        key, says the same; either does when there are at most 64 of them. Reads values, so on a GPU it waits for
        them, but once for each two masks: the result is kept while both live.

        Raises:
            ValueError: the masks are for other tokens, or none of the three ways needs at most 64 groups.
        """
        if (self.queries, self.keys) != (other.queries, other.keys):
            raise ValueError(
                f"Masks for {self.queries} queries x {self.keys} keys and for {other.queries} x {other.keys} "
                "cannot be combined."
            )
        kept: WeakKeyDictionary[TokenGroups, TokenGroups] = self.memo.setdefault("and", WeakKeyDictionary())
        if other not in kept:
            kept[other] = self._combined(other)
        return kept[other]

    def _combined(self, other: TokenGroups) -> TokenGroups:
        mine, others = used_groups(self), used_groups(other)
        if len(mine) * len(others) <= MAX_GROUPS:
            pairs = [(i, j) for i in mine for j in others]
            return TokenGroups(
                _product(self.query_bits, other.query_bits, pairs), _product(self.key_bits, other.key_bits, pairs)
            )
        queries, query_class = _classes(self.query_bits, other.query_bits)
        keys, key_class = _classes(self.key_bits, other.key_bits)
        if min(len(queries), len(keys)) > MAX_GROUPS:
            raise ValueError(
                f"These masks together have {len(mine)} x {len(others)} groups, {len(queries)} kinds of queries and "
                f"{len(keys)} kinds of keys; one of these must be at most {MAX_GROUPS}: use fewer regions, or overlaps."
            )
        allowed = ((queries[:, None] & keys[None]) != 0).all(dim=-1)
        if len(queries) <= len(keys):
            own, seen = torch.eye(len(queries), dtype=torch.bool, device=self.device), allowed.T
        else:
            own, seen = allowed, torch.eye(len(keys), dtype=torch.bool, device=self.device)
        return TokenGroups(pack(own[None])[0][query_class], pack(seen[None])[0][key_class])


def pack(members: torch.Tensor) -> torch.Tensor:
    """Bit sets, int64 (batch, tokens), from bool (batch, tokens, groups)."""
    if members.dtype != torch.bool or members.dim() != 3:
        raise ValueError(
            f"Group members are bool (batch, tokens, groups), not {members.dtype} of shape {tuple(members.shape)}."
        )
    if members.shape[-1] > MAX_GROUPS:
        raise ValueError(f"{members.shape[-1]} groups: token groups hold at most {MAX_GROUPS}.")
    # The bits do not overlap, so their sum is their OR; the last one is the sign, and the sum still holds.
    places = torch.arange(members.shape[-1], device=members.device)
    return (members.long() << places).sum(dim=-1)


def used_groups(groups: TokenGroups) -> list[int]:
    """The groups that some query and some key have."""
    places = torch.arange(MAX_GROUPS, device=groups.device)
    one = torch.ones_like(places)
    sides = (groups.query_bits.unique(), groups.key_bits.unique())
    used = [((bits[:, None] & (one << places)) != 0).any(dim=0) for bits in sides]
    return (used[0] & used[1]).nonzero().flatten().tolist()


def _product(mine: torch.Tensor, others: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Bits of the product groups, (batch, tokens): bit p is set where both bits of pairs[p] are."""
    bits = torch.zeros(torch.broadcast_shapes(mine.shape, others.shape), dtype=torch.int64, device=mine.device)
    for place, (i, j) in enumerate(pairs):
        bits |= ((mine >> i) & (others >> j) & 1) << place
    return bits


def _classes(mine: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct pairs of bit sets, (classes, 2), and each token's class, (batch, tokens)."""
    mine, others = torch.broadcast_tensors(mine, others)
    found, number = torch.stack((mine, others), dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
    return found, number.view(mine.shape)
