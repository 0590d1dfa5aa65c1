"""What the programs of tests/serving.sh hand to each other: prompts, numbers and refusals, as files in one folder.

The programs run in environments of their own: this module needs numpy alone.

Axes: S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

MODELS, EXPORT = "models", "export"
"""Folder of the served models; the one among them that an actual run has trained and that has a tokenizer."""
REFERENCE = "transformers-in-fp64"
"""The findings that all others are held against."""
GREEDY_TOKENS = 8
CONTEXT_TOKENS = 64
PROMPTS = ([5, 6, 7, 8] * 6, list(range(40, 64)), [90, 3, 77, 12, 64, 31, 8, 8, 8, 50, 21, 2, 95, 60, 44, 13])
"""Token ids; longer than the window of the models that have one, and below the vocabulary of the smallest."""


def cases(root: Path) -> list[str]:
    """The names of the models, each a folder."""
    return sorted(folder.name for folder in (root / MODELS).iterdir() if folder.is_dir())


def config_of(root: Path, case: str) -> dict[str, Any]:
    """A model's config.json."""
    return json.loads((root / MODELS / case / "config.json").read_text())


def texts(root: Path) -> tuple[list[str], list[list[int]]]:
    """Texts, and for each the ids that the export was trained on."""
    stored = json.loads((root / "texts.json").read_text())
    return stored["texts"], stored["ids"]


@dataclasses.dataclass
class Findings:
    """What one program has computed; written as NAME.npz and NAME.json."""

    name: str
    version: str
    log_probabilities: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    """Case -> for each prompt [S, V]; the last row is the first generated token's."""
    greedy: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    """Case -> for each prompt the likeliest tokens, one after the other."""
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    """Case -> why it could not be loaded."""
    ids: list[list[int]] = dataclasses.field(default_factory=list)
    """The texts as this program's tokenizer of the export cuts them."""
    started: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, case: str, logits_SV: np.ndarray, greedy: list[int]) -> None:
        """Add one prompt's numbers, normalised here in fp64."""
        logits_SV = logits_SV.astype(np.float64)
        shifted_SV = logits_SV - logits_SV.max(axis=-1, keepdims=True)
        normalised_SV = shifted_SV - np.log(np.exp(shifted_SV).sum(axis=-1, keepdims=True))
        self.log_probabilities.setdefault(case, []).append(normalised_SV)
        self.greedy.setdefault(case, []).append(greedy)

    def write(self, root: Path) -> None:
        """Write both files."""
        arrays = {f"{case}/{at}": a for case, found in self.log_probabilities.items() for at, a in enumerate(found)}
        np.savez(root / f"{self.name}.npz", **arrays)
        told = {"version": self.version, "greedy": self.greedy, "refusals": self.refusals, "ids": self.ids}
        told |= {"seconds": time.monotonic() - self.started}
        (root / f"{self.name}.json").write_text(json.dumps(told))
        print(f"{self.name} {self.version}: {len(self.greedy)} models in {told['seconds']:.0f} s", flush=True)


def read_findings(root: Path, name: str) -> Findings:
    """What a program has written."""
    told = json.loads((root / f"{name}.json").read_text())
    found = Findings(name, told["version"], {}, told["greedy"], told["refusals"], told["ids"])
    with np.load(root / f"{name}.npz") as arrays:
        for case in found.greedy:
            found.log_probabilities[case] = [arrays[f"{case}/{at}"] for at in range(len(PROMPTS))]
    return found
