"""The numbers of llama.cpp, in fp32: python -m tests.serving.served_by_llama ROOT SOURCE, in .venv-llama.

SOURCE is llama-cpp-python's source. Its binding is used from there, its copy of llama.cpp has the converter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_cpp

from tests.serving import exchange

GGML_TYPE_F32 = 0
CONVERT_SECONDS = 120


def main() -> None:
    """Write llama below ROOT."""
    root, source = map(Path, sys.argv[1:])
    found = exchange.Findings("llama", f"of llama-cpp-python {llama_cpp.__version__}")
    (root / "gguf").mkdir()
    for case in exchange.cases(root):
        with_tokenizer = case == exchange.EXPORT
        file = root / "gguf" / f"{case}.gguf"
        error = convert(root / exchange.MODELS / case, file, source / "vendor" / "llama.cpp", with_tokenizer)
        if error:
            found.refusals[case] = error
            continue
        try:
            server = load(file)
        except ValueError as refusal:
            found.refusals[case] = str(refusal)
            continue
        for prompt in exchange.PROMPTS:
            serve(server, case, prompt, found)
        if with_tokenizer:
            texts = exchange.texts(root)[0]
            found.ids = [server.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
        server.close()
    found.write(root)


def convert(folder: Path, file: Path, llama: Path, with_tokenizer: bool) -> str:
    """Convert with llama.cpp's own program; what it says last where it fails, else nothing.

    It knows tokenizers by the ids that they give for a text, so one of pico size is a stranger to it where the
    architecture's are not SentencePiece's. Models that are there for their numbers have none, and go without.
    """
    program = llama / "convert_hf_to_gguf.py"
    words = [str(program), str(folder), f"--outfile={file}", "--outtype=f32"]
    if not with_tokenizer:
        words = ["-m", "tests.serving.convert_without_tokenizer", *words]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=CONVERT_SECONDS, check=False
    )
    said = done.stderr.strip().splitlines()
    return (said[-1] if said else f"exit code {done.returncode}") if done.returncode else ""


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
