"""Texts of several domains into the datasets of a run: ``python -m megatron_btx.data.datasets``.

Makes ``OUTPUT/math.train.bin``, ``.idx`` and ``.dataset.json`` for every domain and split of a description
(:mod:`megatron_btx.data.domains`); last of all ``OUTPUT/datasets.json``, so that a folder that has one is whole. Every
document ends with the end-of-document token.

Under shares, a hash of a document's text and of the seed draws its split. So a document goes to the same split wherever
it stands, in whatever domain, and a repeated document never stands in two. The order of the files, their number and
the number of workers change nothing about that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, exits_with_one_line, printable
from megatron_btx.common.files import ByteProgress, write_json
from megatron_btx.data import readers
from megatron_btx.data.domains import SPLITS, Description, Domain, read_description
from megatron_btx.data.encoding import EncodedUnit, in_order, make_encoder
from megatron_btx.data.indexed import Sink, publish_all
from megatron_btx.data.inputs import Inputs, find_files, listed
from megatron_btx.data.readers import Tally

SUMMARY = "datasets.json"

Sinks = Mapping[tuple[str, str], Sink]
"""(domain, split) -> its dataset in the making."""


def make_datasets(output: Path, description: Description, workers: int = 1, quiet: bool = False) -> dict[str, Any]:
    """Make the datasets of a description; returns what :data:`SUMMARY` says of them.

    Datasets that stand in the folder already are replaced, once all new ones are whole.

    Raises:
        InputError: a file or the tokenizer cannot be used, a split gets no text, or two datasets are the same;
            nothing of this call is left.
        OSError: the disk is full, or a file cannot be read or written; again nothing is left.
    """
    found = find_files(description)
    encoder = make_encoder(description.tokenizer_settings(), append_eod=True, draw_seed=description.seed)
    bad_records = {name: Tally() for name in description.domains}
    with contextlib.ExitStack() as stack:
        encode_all = {}  # one pool for all domains that are read alike
        for domain in description.domains.values():
            reading = domain.json_key, domain.on_bad_record
            if reading not in encode_all:
                refuse = None
                if domain.on_bad_record == "stop":
                    refuse = partial(readers.refuse, key_flag="json-key", skip="on-bad-record: skip")
                own = replace(encoder, keys=(domain.json_key,), refuse_record=refuse)
                encode_all[reading] = in_order(stack, own.encode, workers)
        sinks: dict[tuple[str, str], Sink] = {}
        for name, domain in description.domains.items():
            for split in domain.splits():
                sinks[name, split] = stack.enter_context(Sink(str(output / f"{name}.{split}"), encoder.dtype))
        title = f"tokenizing {sum(len(inputs.files) for inputs in found.values())} file(s)"
        total_bytes = sum(inputs.size_bytes() for inputs in found.values())
        progress = ByteProgress(title, total_bytes, quiet)
        for (name, source), inputs in found.items():
            domain = description.domains[name]
            encode = encode_all[domain.json_key, domain.on_bad_record]
            for encoded in encode(readers.cut_all(inputs.files, (domain.json_key,))):
                _add(encoded, sinks, name, source, domain)
                bad_records[name].merge(encoded.bad_records)
                progress.advance(encoded.input_bytes)
        _refuse_empty_and_equal(sinks, found)
        publish_all(sinks.values(), encoder.described, replaces=output / SUMMARY)
    summary = _summarize(description, sinks, found)
    summary["left_out"] = {name: tally.text() for name, tally in bad_records.items() if tally.counts}
    write_json(output / SUMMARY, summary)
    return summary


def _add(encoded: EncodedUnit, sinks: Sinks, name: str, source: str, domain: Domain) -> None:
    """Append the documents of a unit to the datasets of their splits, in their order."""
    ids, lengths = encoded.ids[domain.json_key], encoded.lengths[domain.json_key]
    if not domain.shares:
        sinks[name, source].add(ids, lengths)
        return
    start = 0
    for length, drawn in zip(lengths, encoded.draws[domain.json_key], strict=True):
        sinks[name, choose_split(drawn, domain.shares)].add(ids[start : start + length], [length])
        start += length


def choose_split(drawn: float, shares: Mapping[Any, float]) -> str:
    """The split of a document with this number, from 0 up to 1: test, valid and train lie one behind the other.

    Train is last, so that more text for training moves no document from one held-out split to the other.
    """
    limit = 0.0
    present = [split for split in reversed(SPLITS) if split in shares]
    for split in present:
        limit += shares[split]
        if drawn < limit:
            return split
    return present[-1]  # the shares' sum may be a little below 1


def _refuse_empty_and_equal(sinks: Sinks, found: Mapping[tuple[str, str], Inputs]) -> None:
    """Refuse a dataset without a document, and two with the same."""
    made: dict[str, str] = {}
    for (name, split), sink in sinks.items():
        if not sink.documents:
            files = found.get((name, split)) or found[name, "text"]
            raise InputError(
                f"{name}: no document for its {split} set in {len(files.files)} file(s), as {files.files[0]}; "
                "give it more text, or a larger share"
            )
        other = made.setdefault(sink.hash.hexdigest(), f"{name}.{split}")
        if other != f"{name}.{split}":
            raise InputError(f"{name}.{split} would hold the same text as {other}; give each text of its own")


def _summarize(description: Description, sinks: Sinks, found: Mapping[tuple[str, str], Inputs]) -> dict[str, Any]:
    domains: dict[str, dict[str, Any]] = {name: {} for name in description.domains}
    for (name, split), sink in sinks.items():
        domains[name][split] = {
            "dataset": f"{name}.{split}",
            "documents": sink.documents,
            "tokens": sink.tokens,
            "bin_sha256": sink.hash.hexdigest(),
        }
    sources: dict[str, dict[str, Any]] = {name: {} for name in description.domains}
    for (name, source), inputs in found.items():
        sources[name][source] = {
            "files": [os.path.abspath(file) for file in inputs.files],
            "bytes": inputs.size_bytes(),
            "not_read": [os.path.abspath(file) for file in inputs.not_read],
        }
    written = description.model_dump(exclude_none=True)
    return {"tokenizer": written["tokenizer"], "seed": description.seed, "domains": domains, "sources": sources}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx datasets",
        description="Make the datasets of several domains from their texts. docs/recipes.md says what is read.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="makes FOLDER/DOMAIN.SPLIT.bin")
    parser.add_argument(
        "--description", required=True, metavar="JSON",
        help="domains, texts, shares and tokenizer: a JSON file, or JSON itself",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    return parser


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """The command ``btx datasets``."""
    arguments = make_parser().parse_args(argv)
    summary = make_datasets(arguments.output, read_description(arguments.description), arguments.workers)
    for name, splits in summary["domains"].items():
        parts = []
        for split, made in splits.items():
            parts.append(f"{split} {made['documents']:,} documents, {made['tokens']:,} tokens")
        print(printable(f"{name}: {'; '.join(parts)}"))
        if name in summary["left_out"]:
            print(printable(f"{name}: left out {summary['left_out'][name]}"))
        for source in summary["sources"][name].values():
            if source["not_read"]:
                print(printable(f"{name}: {listed(map(Path, source['not_read']))}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
