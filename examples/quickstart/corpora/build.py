"""The quickstart's texts and their tokenizer, in one folder: ``python examples/quickstart/make_texts.py``.

Everything comes from this machine: nothing is downloaded. The record ``texts.json`` is written last, so a folder that
has one is whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from examples.quickstart.corpora import code, general, knowledge, math_problems, sources, vocabulary
from examples.quickstart.corpora.split import Group, split
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import hash_file

RECORD = "texts.json"
TOKENIZER = "tokenizer.model"

_MATH_CHARACTERS = 3_050_000
_KNOWLEDGE_CHARACTERS = 2_250_000
_HELD_OUT_CHARACTERS = {"general": 300_000, "code": 270_000, "math": 180_000, "knowledge": 190_000}
"""Each for validation and for test; about 90 thousand tokens (60 thousand for knowledge)."""

DOMAINS = tuple(_HELD_OUT_CHARACTERS)

_GENERATED_PARTS = 8
_FILES_PER_TASK = 16
_TOKENIZER_SHARE = 0.25
_TEMPORARY = ".making"


@dataclass(frozen=True)
class Settings:
    """All that decides what the texts hold, besides the Python environment."""

    seed: int = 1234
    vocab_size: int = 2048
    scale: float = 1.0
    """Share of the full size; for tests."""


def build(
    output: Path,
    settings: Settings,
    workers: int = 1,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Make the texts and the tokenizer in a folder; False when they were there already.

    Raises:
        InputError: bad settings, or a folder that holds texts made with other settings.
        OSError: the disk is full or not writable; the folder then has no record.
    """
    _check(settings, workers)
    if (output / RECORD).exists() and not overwrite:
        _expect_same(output, settings)
        say(f"{output}: the texts are there already, made with these settings; nothing to do")
        return False
    (output / RECORD).unlink(missing_ok=True)
    making = output / _TEMPORARY
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        domains = _write_texts(making, settings, workers, say)
        record = {
            "settings": asdict(settings),
            "sources": sources.versions(general.PACKAGES),
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": hash_file(making / TOKENIZER),
                "vocab_size": settings.vocab_size,
            },
            "domains": domains,
        }
        for file in sorted(making.iterdir()):
            os.replace(file, output / file.name)
        _write_record(making / RECORD, record)
        os.replace(making / RECORD, output / RECORD)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return True


def make_texts(settings: Settings, workers: int) -> dict[str, dict[str, list[str]]]:
    """The documents of every domain and split, made in worker processes."""
    documented = general.source_files()[:: max(1, round(1 / settings.scale))]
    # Twice as dense as the scale says: the library's files are few and large, and three splits need enough of them.
    programs = code.source_files()[:: max(1, round(0.5 / settings.scale))]
    parts = range(_GENERATED_PARTS)

    def size(characters: int) -> int:
        return int(characters * settings.scale) // _GENERATED_PARTS

    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        prose = pool.map(general.extract, documented, chunksize=_FILES_PER_TASK)
        plain = pool.map(code.extract, programs, chunksize=_FILES_PER_TASK)
        problems = pool.map(partial(math_problems.generate, settings.seed, characters=size(_MATH_CHARACTERS)), parts)
        articles = pool.map(partial(knowledge.generate, settings.seed, characters=size(_KNOWLEDGE_CHARACTERS)), parts)
        groups = {
            "general": [Group(one.name, tuple(general.documents(one))) for one in general.without_repeats(prose)],
            "code": _unique(zip([file.name for file in programs], plain, strict=True)),
            "math": _unique(_with_questions(problems)),
            "knowledge": _unique(_with_themselves(articles)),
        }
    return {
        domain: split(groups[domain], int(held_out * settings.scale), settings.seed, domain)
        for domain, held_out in _HELD_OUT_CHARACTERS.items()
    }


def _with_questions(parts: Iterable[list[str]]) -> Iterator[tuple[str, str]]:
    """(question, problem) of every problem."""
    for part in parts:
        for text in part:
            yield math_problems.question_of(text), text


def _with_themselves(parts: Iterable[list[str]]) -> Iterator[tuple[str, str]]:
    """(article, article) of every article."""
    for part in parts:
        for text in part:
            yield text, text


def _unique(pairs: Iterable[tuple[str, str | None]]) -> list[Group]:
    """One group for each key and each text; later ones with a key or a text seen before are dropped."""
    keys: set[str] = set()
    texts: set[str] = set()
    groups: list[Group] = []
    for key, text in pairs:
        if text is not None and key not in keys and text not in texts:
            keys.add(key)
            texts.add(text)
            groups.append(Group(key, (text,)))
    return groups


def _write_texts(
    making: Path, settings: Settings, workers: int, say: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """JSONL files and the tokenizer; what they hold, by domain and split."""
    started = time.monotonic()
    texts = make_texts(settings, workers)
    count = 0
    for parts in texts.values():
        count += sum(map(len, parts.values()))
    say(f"collected and generated {count:,} documents in {time.monotonic() - started:.1f} s")
    described: dict[str, dict[str, dict[str, Any]]] = {}
    for domain, parts in texts.items():
        described[domain] = {}
        for name, documents in parts.items():
            path = making / f"{domain}.{name}.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
            described[domain][name] = {
                "file": path.name,
                "documents": len(documents),
                "bytes": path.stat().st_size,
                "sha256": hash_file(path),
            }
    started = time.monotonic()
    samples = [_sample(parts["train"]) for parts in texts.values()]
    vocabulary.train(itertools.chain.from_iterable(samples), making / TOKENIZER, settings.vocab_size)
    say(f"trained a tokenizer of {settings.vocab_size} pieces in {time.monotonic() - started:.1f} s")
    return described


def _sample(documents: Sequence[str]) -> Iterator[str]:
    """The first quarter of a domain's training text (its order is that of hashes, so any part is a fair one)."""
    left = _TOKENIZER_SHARE * sum(map(len, documents))
    for document in documents:
        if left <= 0:
            return
        left -= len(document)
        yield document


def _check(settings: Settings, workers: int) -> None:
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    if not 0 < settings.scale <= 1:
        raise InputError(f"--scale {settings.scale}: expected a share above 0 and at most 1")
    if settings.vocab_size < vocabulary.MIN_VOCABULARY:
        raise InputError(f"--vocab-size {settings.vocab_size}: expected at least {vocabulary.MIN_VOCABULARY}")


def _expect_same(output: Path, settings: Settings) -> None:
    """Raise InputError unless the folder's texts are whole and were made with these settings."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        found = record["settings"]
        files = {record["tokenizer"]["file"]: record["tokenizer"]["sha256"]}
        for parts in record["domains"].values():
            for part in parts.values():
                files[part["file"]] = part["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{output / RECORD}: not a record of these texts ({error!r}); add --overwrite to remake"
        ) from error
    if found != asdict(settings):
        raise InputError(
            f"{output}: holds texts made with {found}, asked for {asdict(settings)};"
            " choose another folder or add --overwrite"
        )
    for name, expected in files.items():
        if not (output / name).is_file() or hash_file(output / name) != expected:
            raise InputError(f"{output / name}: missing or changed since it was made; add --overwrite to remake")


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _table(output: Path) -> str:
    """What a folder holds, for people."""
    record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    rows = [f"{'domain':<10} {'split':<6} {'documents':>9} {'MB':>7}"]
    for domain, parts in record["domains"].items():
        for name, part in parts.items():
            size = part["bytes"] / 1e6
            rows.append(f"{domain:<10} {name:<6} {part['documents']:>9,} {size:>7.2f}")
    made_from = ", ".join(f"{name} {version}" for name, version in record["sources"].items())
    return "\n".join([*rows, f"made from: {made_from}; seed {record['settings']['seed']}; nothing was downloaded"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_texts.py", description="Make the quickstart's texts and tokenizer out of what this machine has."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for texts and tokenizer")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of the drawn texts (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=Settings.vocab_size, help="of the tokenizer (default: %(default)s)"
    )
    parser.add_argument("--scale", type=float, default=Settings.scale, help="share of the full size (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes (default: 2); the output does not depend on it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace texts that are there")
    return parser


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Make the texts, and print what the folder holds."""
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.seed, arguments.vocab_size, arguments.scale)
    if build(arguments.output, settings, arguments.workers, arguments.overwrite):
        print(_table(arguments.output))
    return 0
