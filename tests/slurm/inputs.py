"""Texts of two domains and a tokenizer for them, written in a moment."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

RECIPE = Path(__file__).with_name("recipe.yaml")
_WORDS = {"general": "the cat sat on a mat and saw one bird fly over the hill", "math": "let x be 1 + 2 then y = 3 x"}
_DOCUMENTS = 120


def write_inputs(folder: Path) -> Path:
    """Everything that the recipe names, and the recipe; its path."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    everything: list[str] = []
    for domain, words in _WORDS.items():
        draw = random.Random(domain)
        documents = [" ".join(draw.choices(words.split(), k=40)) for _ in range(_DOCUMENTS)]
        lines = [json.dumps({"text": document}) for document in documents]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        everything += documents
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(everything),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Path(shutil.copy(RECIPE, folder / "recipe.yaml"))
