"""Text files into Megatron's indexed datasets: the command ``btx preprocess``.

The flags are Megatron's own. The result is ``PREFIX_<key>_document.bin`` and ``.idx``, byte for byte the same for
any number of workers, and it appears under these names only when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_btx.common.errors import InputError, exits_with_one_line, printable
from megatron_btx.common.files import ByteProgress
from megatron_btx.data import readers, tokenizers
from megatron_btx.data.encoding import in_order, make_encoder
from megatron_btx.data.indexed import Sink, publish_all
from megatron_btx.data.inputs import ENDINGS, expand_inputs, listed
from megatron_btx.data.readers import Tally
from megatron_btx.data.tokenizers import TokenizerSettings


@dataclass(frozen=True)
class DatasetSummary:
    """What one run of the preprocessing made."""

    prefixes: tuple[str, ...]
    """Paths without ``.bin``/``.idx``, one for each JSON key: what Megatron's ``--data-path`` takes."""
    documents: int
    """Documents written, in each of the datasets together."""
    empty_documents: int
    """Documents left out because they hold no token."""
    tokens: int
    """Tokens written, end-of-document tokens included."""
    output_bytes: int
    """Size of the ``.bin`` files."""
    seconds: float
    """Wall-clock time."""
    bad_records: Tally
    """Records left out because nothing could be read from them."""
    not_read: tuple[Path, ...]
    """Files that directories hold besides those that were read."""

    def line(self) -> str:
        """The summary as one line for people."""
        skipped = bad = beside = ""
        if self.empty_documents:
            skipped = f" ({self.empty_documents} empty ones left out)"
        if self.bad_records.counts:
            bad = f"; left out {self.bad_records.text()}"
        if self.not_read:
            beside = f"; {listed(self.not_read)}"
        return (
            f"{', '.join(self.prefixes)}: {self.documents:,} documents{skipped}, {self.tokens:,} tokens,"
            f" {self.output_bytes:,} bytes, {self.tokens / self.documents:.1f} tokens per document,"
            f" {self.seconds:.1f} s{bad}{beside}"
        )


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_settings: TokenizerSettings,
    *,
    json_keys: Sequence[str] = (readers.TEXT_KEY,),
    append_eod: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    skip_bad_records: bool = False,
    quiet: bool = False,
) -> DatasetSummary:
    """Tokenize text files into one indexed dataset for each JSON key.

    Documents keep their order. Documents without tokens are left out.

    Args:
        skip_bad_records: count records that cannot be read, and go on. A damaged file stops the work all the same.

    Raises:
        InputError: anything wrong with inputs, tokenizer or output; nothing is left at the output's names, except
            that an overwritten dataset may be gone.
        OSError: the disk is full, or a file cannot be read or written; again nothing is left.
    """
    started = time.monotonic()
    found = expand_inputs(inputs)
    keys = tuple(dict.fromkeys(json_keys))
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    for existing in (Path(f"{prefix}{suffix}") for prefix in prefixes.values() for suffix in (".bin", ".idx")):
        if existing.exists() and not overwrite:
            raise InputError(f"--output-prefix: {existing} exists; choose another prefix or add --overwrite")
    refuse = None
    if not skip_bad_records:
        refuse = partial(readers.refuse, key_flag="--json-keys", skip="--on-bad-record skip")
    encoder = make_encoder(tokenizer_settings, keys, append_eod=append_eod, refuse_record=refuse)
    empty_documents = 0
    bad_records = Tally()
    with contextlib.ExitStack() as stack:
        encode_all = in_order(stack, encoder.encode, workers)
        sinks = {key: stack.enter_context(Sink(prefix, encoder.dtype)) for key, prefix in prefixes.items()}
        progress = ByteProgress(f"tokenizing {len(found.files)} file(s)", found.size_bytes(), quiet)
        for encoded in encode_all(readers.cut_all(found.files, keys)):
            for key, sink in sinks.items():
                sink.add(encoded.ids[key], encoded.lengths[key])
            empty_documents += encoded.empty_documents
            bad_records.merge(encoded.bad_records)
            progress.advance(encoded.input_bytes)
        for key, sink in sinks.items():
            if sink.documents == 0:
                seen = f"{len(found.files)} file(s), {empty_documents} document(s) without tokens"
                if bad_records.counts:
                    seen += f", {bad_records.text()}; the first: {bad_records.shown[0]}"
                raise InputError(f"--input {' '.join(inputs)}: no text under the key {key!r} ({seen})")
        publish_all(sinks.values(), encoder.described)
    return DatasetSummary(
        prefixes=tuple(prefixes.values()),
        documents=sum(sink.documents for sink in sinks.values()),
        empty_documents=empty_documents,
        tokens=sum(sink.tokens for sink in sinks.values()),
        output_bytes=sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes.values()),
        seconds=time.monotonic() - started,
        bad_records=bad_records,
        not_read=found.not_read,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx preprocess",
        description="Turn JSON, text or Parquet files into Megatron's indexed datasets. "
        "docs/recipes.md says what is read, docs/checks.md what is refused.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help=f"files, globs or directories with all below them; endings: {ENDINGS}",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, help="makes PREFIX_<key>_document.bin and .idx")
    parser.add_argument("--tokenizer-type", required=True, choices=tokenizers.TOKENIZER_TYPES)
    parser.add_argument("--tokenizer-model", help="a SentencePiece file, or a Hugging Face folder or name")
    parser.add_argument("--vocab-size", type=int, help="only for NullTokenizer: the number of token ids")
    parser.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="Hugging Face only: without the tokens that the tokenizer itself adds around a text",
    )
    parser.add_argument("--json-keys", nargs="+", default=[readers.TEXT_KEY], help="one dataset each (default: text)")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    parser.add_argument(
        "--on-bad-record", choices=("stop", "skip"), default="stop",
        help="what a record does that cannot be read: stop the work (default), or be counted, named and left out; "
        "a damaged file always stops it",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """The command ``btx preprocess``."""
    arguments = make_parser().parse_args(argv)
    summary = preprocess(
        arguments.input,
        arguments.output_prefix,
        TokenizerSettings(
            arguments.tokenizer_type,
            arguments.tokenizer_model,
            arguments.vocab_size,
            arguments.tokenizer_hf_no_include_special_tokens,
        ),
        json_keys=arguments.json_keys,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        skip_bad_records=arguments.on_bad_record == "skip",
    )
    for line in summary.bad_records.shown:
        print(printable(f"left out: {line}"), file=sys.stderr)
    print(printable(summary.line()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
