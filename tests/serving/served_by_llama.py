"""The numbers of llama.cpp, in fp32, for what convert_for_llama.py has written.

python -m tests.serving.served_by_llama ROOT, with llama-cpp-python's source on the path: its binding is used as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp

from tests.serving import exchange

GGML_TYPE_F32 = 0


def main() -> None:
    """Write llama below ROOT."""
    root = Path(sys.argv[1])
    found = exchange.Findings("llama", f"of llama-cpp-python {llama_cpp.__version__}")
    found.refusals |= json.loads((root / "gguf" / "refusals.json").read_text())
    for case in exchange.cases(root):
        if case in found.refusals:
            continue
        try:
            server = load(root / "gguf" / f"{case}.gguf")
        except ValueError as refusal:
            found.refusals[case] = str(refusal)
            continue
        for prompt in exchange.PROMPTS:
            serve(server, case, prompt, found)
        if case == exchange.EXPORT:
            texts = exchange.texts(root)[0]
            found.ids = [server.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
        server.close()
    found.write(root)


def load(file: Path) -> llama_cpp.Llama:
    """Load a model, keys and values in fp32 as well."""
    return llama_cpp.Llama(
        str(file),
        n_ctx=exchange.CONTEXT_TOKENS,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )


def serve(server: llama_cpp.Llama, case: str, prompt: list[int], found: exchange.Findings) -> None:
    """The prompt in one batch, then token after token."""
    server.reset()
    server.eval(prompt)
    logits_SV = server.scores[: len(prompt)].copy()
    greedy = [int(logits_SV[-1].argmax())]
    while len(greedy) < exchange.GREEDY_TOKENS:
        server.eval(greedy[-1:])
        greedy.append(int(server.scores[server.n_tokens - 1].argmax()))
    found.add(case, logits_SV, greedy)


if __name__ == "__main__":
    main()
