"""Texts of several domains into the datasets of a run: ``python -m megatron_btx.data.datasets``.

A description says which files are a domain's, and how they are split:

    {"tokenizer": {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "models/seed"}, "seed": 1234,
     "domains": {"math": {"text": ["math.jsonl"], "shares": {"train": 0.98, "valid": 0.01, "test": 0.01}},
                 "code": {"train": ["code/train"], "valid": ["code/valid"]}}}

It makes ``OUTPUT/math.train.bin``, ``.idx`` and so on; last of all ``OUTPUT/datasets.json`` with what is in them.
Every document ends with the end-of-document token. Under shares each document is drawn for one split; which one follows
from the seed, the domain's name and the document's number alone, so that the number of workers changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.data import readers
from megatron_btx.data.inputs import expand_inputs
from megatron_btx.data.preprocess import Encoder, make_encoder
from megatron_btx.data.progress import ByteProgress
from megatron_btx.data.sink import Sink
from megatron_btx.data.tokenizers import TokenizerSettings
from megatron_btx.data.workers import in_order
from megatron_btx.ground.errors import InputError, exits_with_one_line
from megatron_btx.ground.files import hash_file, read_json_object, write_json

if TYPE_CHECKING:
    import numpy

SUMMARY = "datasets.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Domain:
    """The text of one domain."""

    name: str
    files: Mapping[str, Sequence[str]]
    """Split -> files, folders or patterns; under "text" those that are drawn for the splits by ``shares``."""
    shares: Mapping[str, float]
    """Split -> share of the documents."""

    def splits(self) -> tuple[str, ...]:
        """The datasets that are made of it."""
        return tuple(self.shares or self.files)


class Drawing:
    """Draws a split for each document of a domain, one after the other."""

    def __init__(self, domain: Domain, seed: int) -> None:
        import numpy

        self._names = list(domain.shares)
        self._limits = numpy.cumsum(list(domain.shares.values()))
        self._generator = numpy.random.default_rng([seed, zlib.crc32(domain.name.encode())])

    def draw(self, documents: int) -> dict[str, numpy.ndarray[Any, Any]]:
        """Split -> which of the next ``documents`` are its own."""
        numbers = self._generator.random(documents) * self._limits[-1]
        chosen = self._limits.searchsorted(numbers, side="right")
        return {name: chosen == index for index, name in enumerate(self._names)}


def make_datasets(
    output: Path, description: Mapping[str, Any], workers: int = 1, quiet: bool = False
) -> dict[str, Any]:
    """Make the datasets of a description; returns what :data:`SUMMARY` says of them.

    Raises:
        InputError: a file or the tokenizer cannot be used, or a split gets no text.
    """
    domains = [_read_domain(name, said) for name, said in description["domains"].items()]
    encoder = make_encoder(_read_tokenizer(description["tokenizer"]), (readers.TEXT_KEY,), True, False)
    summary: dict[str, Any] = {}
    for domain in domains:
        summary[domain.name] = {}
        for source, patterns in domain.files.items():
            made = _make_domain(output, domain, source, patterns, encoder, int(description["seed"]), workers, quiet)
            summary[domain.name] |= made
    write_json(output / SUMMARY, {"tokenizer": description["tokenizer"], "domains": summary})
    return summary


def _make_domain(
    output: Path,
    domain: Domain,
    source: str,
    patterns: Sequence[str],
    encoder: Encoder,
    seed: int,
    workers: int,
    quiet: bool,
) -> dict[str, Any]:
    """One pass over files of a domain, into one dataset or into one for every share."""
    files = expand_inputs(list(patterns)).files
    splits = domain.splits() if domain.shares else (source,)
    drawing = Drawing(domain, seed)
    with contextlib.ExitStack() as stack:
        # The pool starts before the progress bar does: forking a process that runs threads is unsafe.
        encode_all = in_order(stack, encoder.encode, workers)
        sinks = {name: stack.enter_context(Sink(f"{output}/{domain.name}.{name}", encoder.dtype)) for name in splits}
        total_bytes = sum(file.stat().st_size for file in files)
        progress = stack.enter_context(ByteProgress(f"{domain.name}: {len(files)} file(s)", total_bytes, quiet))
        for encoded in encode_all(unit for file in files for unit in readers.cut(file, encoder.keys)):
            ids, lengths = encoded.ids[readers.TEXT_KEY], encoded.lengths[readers.TEXT_KEY]
            if domain.shares:
                _add_by_shares(sinks, drawing, ids, lengths)
            else:
                sinks[source].add(ids, lengths)
            progress.advance(encoded.input_bytes)
        for name, sink in sinks.items():
            if sink.documents == 0:
                found = f"{len(files)} file(s) as {', '.join(map(str, files[:2]))}"
                raise InputError(f"{domain.name}: no document for its {name} set in {found}; give it more text")
            sink.write_index(encoder.described)
        for sink in sinks.values():
            sink.publish()
    return {name: _summarize(output / f"{domain.name}.{name}", sink) for name, sink in sinks.items()}


def _add_by_shares(
    sinks: Mapping[str, Sink], drawing: Drawing, ids: numpy.ndarray[Any, Any], lengths: Sequence[int]
) -> None:
    """Append each document to the split that is drawn for it."""
    import numpy

    lengths_D = numpy.array(lengths, dtype=numpy.int64)
    for name, is_own_D in drawing.draw(len(lengths)).items():
        sinks[name].add(ids[numpy.repeat(is_own_D, lengths_D)], lengths_D[is_own_D].tolist())


def _summarize(prefix: Path, sink: Sink) -> dict[str, Any]:
    hashes = {suffix: hash_file(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx")}
    return {"documents": sink.documents, "tokens": sink.tokens, "sha256": hashes}


def _read_domain(name: str, said: Mapping[str, Any]) -> Domain:
    """A domain of the description. Raises InputError where its files or shares are not of the form."""
    files = {key: value for key, value in said.items() if key != "shares"}
    shares = dict(said.get("shares", {}))
    expected = {"text"} if shares else set(SPLITS)
    unknown = sorted(set(files) - expected | set(shares) - set(SPLITS))
    if unknown or not files:
        what = f"found {', '.join(unknown) or 'no files'}"
        raise InputError(
            f"--description: domains.{name}: {what}; expected text with shares, or some of {', '.join(SPLITS)}"
        )
    return Domain(name, files, shares)


def _read_tokenizer(flags: Mapping[str, Any]) -> TokenizerSettings:
    """Megatron's tokenizer flags, spelled without their leading dashes. Raises InputError for one of no effect here."""
    known = TokenizerSettings.__dataclass_fields__
    settings = {name.replace("-", "_"): value for name, value in flags.items()}
    for name in settings:
        if name not in known:
            flag = name.replace("_", "-")
            raise InputError(f"--description: tokenizer.{flag}: this flag is not known here; leave it out")
    if settings.get("vocab_size") is not None:
        settings["vocab_size"] = int(settings["vocab_size"])
    return TokenizerSettings(**settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_btx.data.datasets",
        description="Make the datasets of several domains from their texts.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="makes FOLDER/DOMAIN.SPLIT.bin")
    parser.add_argument(
        "--description",
        required=True,
        metavar="JSON",
        help="domains, texts, shares and tokenizer: a file, or JSON itself",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    return parser


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Make the datasets, and say how much is in them."""
    arguments = _parser().parse_args(argv)
    if arguments.description.lstrip().startswith("{"):
        description = json.loads(arguments.description)
    else:
        description = read_json_object(Path(arguments.description), "give the description of the datasets")
    summary = make_datasets(arguments.output, description, arguments.workers)
    for domain, splits in summary.items():
        parts = [f"{name} {made['documents']:,} documents, {made['tokens']:,} tokens" for name, made in splits.items()]
        print(f"{domain}: {'; '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
