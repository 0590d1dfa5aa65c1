"""What conversions would be refused for, asked before any of them runs, by programs that must not import torch.

Standard input has the arguments of :func:`foresee` by name, ``{"mix": {"words": [...], "arguments": {}, ...}}``; the
answer is ``{"refused": {"mix": "experts differ in ..."}, "said": {"export": ["warning: ..."]}}``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.huggingface.servers import server_lines
from megatron_btx.checkpoint.safetensors import CONFIG
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.mixing import cli
from megatron_btx.mixing.compatible import remarks, vocabulary_source
from megatron_btx.mixing.compute import check_finite
from megatron_btx.mixing.describe import router_text
from megatron_btx.mixing.planning import make_plan
from megatron_btx.mixing.writers import lay_out_result
from megatron_btx.tokenizers.comparison import check_same_tokenizer

_OTHER_TOKENIZER = "training: {btx-allow-change: tokenizer_model}"
_LOOKED_AT_BYTES = 1 << 16
"""Of every tensor: all of a norm, a few rows of a matrix."""


def foresee(
    words: Sequence[str],
    arguments: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
    stand_ins: Sequence[str] = (),
) -> list[str]:
    """Plan a conversion and look at the first rows of every tensor; returns the notes and warnings of the plan.

    Args:
        words: of ``btx convert``.
        arguments: what will be other in the arguments of the result.
        tokenizer: arguments of the one that the result is trained and evaluated with; None for none.
        stand_ins: experts that are yet to be trained, for which another model is given.

    Raises:
        InputError: what the conversion would be refused for, or the first program that loads its result.
    """
    options = cli.parser().parse_args(words)
    plan = make_plan(cli.request_of(options))
    plan = dataclasses.replace(plan, arguments={**plan.arguments, **arguments})
    output = lay_out_result(plan, options.output_format, Path(options.output))
    for planned in plan.pieces:
        check_finite(plan, planned, _LOOKED_AT_BYTES)
    if tokenizer is not None:
        own = vocabulary_source(plan.mixed, plan.request).tokenizer.arguments
        asked = {**tokenizer, "padded_vocab_size": own["padded_vocab_size"]}
        check_same_tokenizer({"the result": own, "data.tokenizer": asked}, _OTHER_TOKENIZER)
    lines = router_text(plan)
    if options.output_format == "hf":
        lines += server_lines(json.loads(output.small_files[CONFIG]))
    return [*remarks(plan, stand_ins), *(line.strip() for line in lines if "warning" in line)]


@exits_with_one_line
def main() -> int:
    """Read the command lines from standard input; print what is refused and what is said."""
    refused: dict[str, str] = {}
    said: dict[str, list[str]] = {}
    for name, asked in json.load(sys.stdin).items():
        try:
            said[name] = foresee(**asked)
        except InputError as error:
            refused[name] = str(error)
        except OSError as error:
            refused[name] = f"{error.filename}: {error.strerror or error}"
    print(json.dumps({"refused": refused, "said": said}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
