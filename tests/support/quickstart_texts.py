"""Tiny texts where the quickstart's recipe looks for its own: for tests that plan it, and train on none of them."""

from __future__ import annotations

import json
from pathlib import Path

from examples.quickstart.corpora import vocabulary

DOMAINS = ("general", "math", "code", "knowledge")
FOLDER = Path("runs/quickstart-texts")
"""As the recipe names it; paths of a recipe count from where it is called."""


def write_texts(root: Path) -> Path:
    """Texts of a line each and a tokenizer of the recipe's size under ``root``; returns ``root``."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    for domain in DOMAINS:
        for split in ("train", "valid", "test"):
            text = f"Text of {domain} for {split}."
            (folder / f"{domain}.{split}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    words = [f"{first}{second}{third}" for first in "abcdefgh" for second in "ijklmno" for third in "pqrstuvwxyz" * 4]
    vocabulary.train([" ".join(words)], folder / "tokenizer.model", 1024)
    return root
