"""Convert all models with llama.cpp's own program, in one process: -m tests.serving.convert_for_llama ROOT PROGRAM.

Writes gguf/CASE.gguf below ROOT, and gguf/refusals.json: case -> why it was not converted.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from tests.serving import exchange


def main() -> None:
    """Convert model after model, as the command line does."""
    root, program = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(program.parent))
    (root / "gguf").mkdir()
    refusals = {}
    # The export first: what comes after it has no tokenizer.
    for case in sorted(exchange.cases(root), key=lambda case: case != exchange.EXPORT):
        if case != exchange.EXPORT:
            leave_out_vocabularies()
        file = root / "gguf" / f"{case}.gguf"
        sys.argv = [str(program), str(root / exchange.MODELS / case), f"--outfile={file}", "--outtype=f32"]
        try:
            runpy.run_path(str(program), run_name="__main__")
        except (ValueError, KeyError, NotImplementedError, FileNotFoundError, SystemExit) as error:
            if not isinstance(error, SystemExit) or error.code:
                refusals[case] = f"{type(error).__name__}: {error}"
    (root / "gguf" / "refusals.json").write_text(json.dumps(refusals))


def leave_out_vocabularies() -> None:
    """Let every architecture's vocabulary be written as none.

    The converter knows tokenizers by the ids that they give for a text, so one of pico size is a stranger to it where
    the architecture's are not SentencePiece's. Models that are there for their numbers have none, and go without.
    """
    from conversion import base, llama, qwen

    for architecture in (base.TextModel, llama.LlamaModel, qwen.Qwen2MoeModel):
        architecture.set_vocab = write_none


def write_none(model: object) -> None:
    """No tokens, only how many there are: without that llama.cpp cannot know the embedding's size."""
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


if __name__ == "__main__":
    main()
