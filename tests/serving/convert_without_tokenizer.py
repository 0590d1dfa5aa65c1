"""llama.cpp's converter for folders without a tokenizer: convert_without_tokenizer PROGRAM FOLDER ..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the program, with every architecture's vocabulary written as none."""
    program = Path(sys.argv[1])
    sys.path.insert(0, str(program.parent))
    from conversion import base, llama, qwen

    for architecture in (base.TextModel, llama.LlamaModel, qwen.Qwen2MoeModel):
        architecture.set_vocab = write_none
    sys.argv = sys.argv[1:]
    runpy.run_path(str(program), run_name="__main__")


def write_none(model: object) -> None:
    """No tokens, only how many there are: without that llama.cpp cannot know the embedding's size."""
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


if __name__ == "__main__":
    main()
