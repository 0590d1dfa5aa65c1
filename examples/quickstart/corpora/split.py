"""Train, validation and test: disjoint by document, dealt out by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_btx.common.errors import InputError

SPLITS = ("train", "valid", "test")

_LARGEST_SHARE_OF_A_QUOTA = 0.2


@dataclass(frozen=True)
class Group:
    """Documents that must stay in one split, because they come from one file or tell one problem."""

    key: str
    """What decides the split, by its hash; unique within a domain."""
    documents: tuple[str, ...]

    @property
    def characters(self) -> int:
        """Total length."""
        return sum(map(len, self.documents))


def split(groups: Sequence[Group], held_out_characters: int, seed: int, domain: str) -> dict[str, list[str]]:
    """Deal groups out in the order of their hashes: test and valid until each has its quota, the rest to train.

    A group larger than a fifth of the quota always goes to train, so that no single file makes up a validation set.

    Raises:
        InputError: there is too little text for three splits.
    """
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    missing = {"test": held_out_characters, "valid": held_out_characters}
    ordered = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}\n{group.key}".encode()).digest())
    for group in ordered:
        small = group.characters <= _LARGEST_SHARE_OF_A_QUOTA * held_out_characters
        name = next((name for name, rest in missing.items() if rest > 0 and small), "train")
        parts[name] += group.documents
        if name in missing:
            missing[name] -= group.characters
    if max(missing.values()) > 0 or not parts["train"]:
        found = sum(group.characters for group in groups)
        raise InputError(f"corpus {domain}: {found} characters are too few for train, valid and test; raise the scale")
    return parts
