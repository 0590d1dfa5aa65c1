"""Write the models that are served: mixtures of all three families made by the product, and one trained export.

python -m tests.serving.models ROOT RUN: RUN is a finished run of recipe.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_btx.mixing import cli, convert_hf
from tests.serving import exchange
from tests.support import hugging_face

EXPERTS = 3
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""Heads of 32: vLLM's attention on the CPU supports none smaller."""
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 64}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One mixture: the dense models that are mixed, and the flags of the mix."""

    dense: str
    change: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    flags: tuple[str, ...] = ()


CASES = {
    "mixtral": Case("llama"),
    "mixtral-llama3-rope": Case("llama-tied", {"rope_scaling": _LLAMA3}),
    "mixtral-window": Case("mistral"),
    "qwen2-moe": Case("qwen2"),
    "qwen2-moe-all-experts": Case("qwen2", flags=(f"--moe-router-topk={EXPERTS}",)),
    "qwen2-moe-dense-layer": Case("qwen2", flags=("--moe-router-topk=1", "--moe-layer-freq=[0,1]")),
    "qwen2-moe-tied": Case("qwen2", {"tie_word_embeddings": True}, ("--moe-router-topk=1",)),
    "qwen2-moe-top-1": Case("qwen2", flags=("--moe-router-topk=1",)),
    "qwen3-moe": Case("qwen3"),
    "qwen3-moe-dense-layer": Case("qwen3", flags=("--moe-layer-freq=[0,1]",)),
    "qwen3-moe-llama3-rope": Case("qwen3", {"rope_scaling": _LLAMA3}),
    "qwen3-moe-top-1": Case("qwen3", flags=("--moe-router-topk=1",)),
    "qwen3-moe-window": Case("qwen3", _WINDOW),
}
"""Every family as it is usually written, and each condition that servers can be asked about at this size.

With one expert per token the weights are those of the softmax over all experts, with more those over the chosen."""


def write_mixture(root: Path, name: str) -> None:
    """Make three dense models and mix them, with routers that decide clearly."""
    case, sources = CASES[name], root / "sources" / name
    config = hugging_face.MODELS[case.dense] | _SIZES | case.change
    sources.mkdir(parents=True)
    words = [f"--output={root / exchange.MODELS / name}", "--output-format=hf", *case.flags]
    for seed in range(EXPERTS):
        folder = hugging_face.save(hugging_face.make_model(config, seed), sources / str(seed))
        words.append(f"--expert=e{seed}={folder}")
    layers = 1 if any("--moe-layer-freq" in flag for flag in case.flags) else config["num_hidden_layers"]
    # A quarter of a usual deviation of 1: at this width logits would be near 8, and their rounding all that is seen.
    rows_LEH = hugging_face.router_rows(layers, EXPERTS, config["hidden_size"]) / 4
    np.save(sources / "rows.npy", rows_LEH.numpy())
    words.append(f"--router-init={sources / 'rows.npy'}")
    if cli.main(words):
        raise SystemExit(f"{name}: the mix failed")


def write_export(root: Path, run: Path) -> None:
    """Export the finetuned mixture of a run, and the ids that its tokenizer gave for texts in training."""
    target = root / exchange.MODELS / exchange.EXPORT
    if convert_hf.main(["export", f"--checkpoint={run / 'finetune' / 'checkpoint'}", f"--output={target}"]):
        raise SystemExit("the export failed")
    import sentencepiece

    made = root / "texts"
    trained = sentencepiece.SentencePieceProcessor(str(made / "tokenizer.model"))
    texts = []
    for file in sorted(made.glob("*.jsonl")):
        with file.open() as lines:
            texts += [json.loads(next(lines))["text"][:2000] for _ in range(5)]
    texts += ["", " leading", "two  blanks", "a\nb\n", "\ttab", "naïve café 北京 🙂", "def f(x):\n    return x\n"]
    ids = [trained.encode(text) for text in texts]
    (root / "texts.json").write_text(json.dumps({"texts": texts, "ids": ids}))


def main() -> None:
    """Write all models below ROOT."""
    root, run = map(Path, sys.argv[1:])
    for name in CASES:
        write_mixture(root, name)
    write_export(root, run)


if __name__ == "__main__":
    main()
