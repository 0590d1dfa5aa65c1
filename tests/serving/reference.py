"""The numbers of transformers, of whatever version PYTHONPATH names: python -m tests.serving.reference ROOT [fp64].

With fp64 they are what all others are held against: rounding then counts once, that of the program looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.serving import exchange
from tests.support import hugging_face


def main() -> None:
    """Write transformers-4, transformers-5 or, in fp64, the reference below ROOT."""
    root, exact = Path(sys.argv[1]), sys.argv[2:] == ["fp64"]
    transformers = hugging_face.quiet()
    version = transformers.__version__
    name = exchange.REFERENCE if exact else f"transformers-{version.partition('.')[0]}"
    found = exchange.Findings(name, version)
    for case in exchange.cases(root):
        model = hugging_face.loaded(root / exchange.MODELS / case)
        if exact:
            model.set_experts_implementation("eager")  # grouped products know no fp64
            model.double()
        for prompt in exchange.PROMPTS:
            tokens_BS = torch.tensor([prompt])
            for _ in range(exchange.GREEDY_TOKENS):
                with torch.no_grad():
                    logits_SV = model(tokens_BS).logits[0]
                tokens_BS = torch.cat([tokens_BS, logits_SV[-1:].argmax(-1, keepdim=True)], dim=1)
            greedy = tokens_BS[0, len(prompt) :].tolist()
            found.add(case, logits_SV[: len(prompt)].numpy(), greedy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / exchange.MODELS / exchange.EXPORT)
    found.ids = [tokenizer.encode(text, add_special_tokens=False) for text in exchange.texts(root)[0]]
    found.write(root)


if __name__ == "__main__":
    main()
