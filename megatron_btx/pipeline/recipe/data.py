"""The section ``data`` of a recipe: corpora that the run makes, or datasets that are given, and the domains' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.pipeline.recipe.flags import Flags, FlagValue
from megatron_btx.pipeline.recipe.reading import Section

QUICKSTART_DOMAINS = ("general", "math", "code", "knowledge")
SPLITS = ("train", "valid", "test")
GENERALIST = "seed"
RESERVED_NAMES = {GENERALIST: "the seed, which can be an expert of the mix", "mean": "a column of the reports"}
"""Names that no domain may have."""
LARGEST_SHARE = 1e15
"""Of a blend: all shares together stay a number."""
_CORPORA_KEYS = ("corpora", "vocab-size", "workers", "seed", "scale")


@dataclass(frozen=True)
class Data:
    """Either corpora that the run makes, or prefixes of existing .bin/.idx files per domain."""

    corpora: Flags
    """Flags of ``btx corpora``; empty when the data are given."""
    workers: int
    domains: Mapping[str, Mapping[str, tuple[tuple[float, str], ...]]]
    """Domain -> split -> (weight, absolute prefix); empty when the run makes its corpora."""
    tokenizer: Flags


def read_data(top: Section) -> tuple[Data, tuple[str, ...]]:
    """The section ``data``, and the domains that the recipe uses, in its order.

    Raises:
        InputError: the place, what was found, what was expected.
    """
    section = top.section("data", (*_CORPORA_KEYS, "tokenizer", "domains"))
    listed = top.node.get("domains")
    if ("corpora" in section.node) == ("domains" in section.node):
        top.refuse("data", "expected either corpora: quickstart (made by the run) or domains: (.bin/.idx files)")
    if "corpora" in section.node:
        if section.text("corpora") != "quickstart" or "tokenizer" in section.node:
            section.refuse("corpora", "expected quickstart, and no tokenizer beside it (one is trained on the corpora)")
        tokenizer = {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "data/tokenizer.model"}
        workers = section.processes("workers", 2)
        corpora: dict[str, FlagValue] = {"vocab-size": section.integer("vocab-size"), "workers": workers}
        if "seed" in section.node:
            corpora["seed"] = section.integer("seed", minimum=0)
        if "scale" in section.node:
            scale = section.node["scale"]
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1:
                section.refuse("scale", f"found {scale!r}, expected the share of the full size, above 0 and at most 1")
            corpora["scale"] = scale
        data = Data(corpora, workers, {}, tokenizer)
        names = QUICKSTART_DOMAINS
    else:
        for key in _CORPORA_KEYS[1:]:
            if key in section.node:
                section.refuse(key, "only for corpora that the run makes; a given tokenizer goes under tokenizer")
        named = section.named("domains")
        named.check_names(RESERVED_NAMES)
        given = {domain: _splits(named, domain) for domain in named.node}
        names = tuple(given)
        tokenizer_flags = dict(section.flags("tokenizer", allowed=("tokenizer-type", "tokenizer-model")))
        if "tokenizer-type" not in tokenizer_flags:
            section.refuse("tokenizer", "missing tokenizer-type; expected Megatron's tokenizer flags for these data")
        model = tokenizer_flags.get("tokenizer-model")
        if isinstance(model, str) and section.path("tokenizer", model).exists():
            tokenizer_flags["tokenizer-model"] = str(section.path("tokenizer", model))
        elif model is not None and tokenizer_flags["tokenizer-type"] != "HuggingFaceTokenizer":
            section.refuse("tokenizer", f"tokenizer-model {model} does not exist")
        data = Data({}, 0, given, tokenizer_flags)
    if listed is not None and (not isinstance(listed, list) or not listed or not set(map(str, listed)) <= set(names)):
        top.refuse("domains", f"found {listed!r}, expected a list of some of: {', '.join(names)}")
    if listed is not None and len(set(map(str, listed))) < len(listed):
        top.refuse("domains", f"found {listed!r}, expected every domain once")
    return data, tuple(map(str, listed)) if listed else names


def _splits(domains: Section, domain: str) -> Mapping[str, tuple[tuple[float, str], ...]]:
    section = domains.section(domain, SPLITS)
    splits: dict[str, tuple[tuple[float, str], ...]] = {}
    for split, entries in section.node.items():
        if not isinstance(entries, list) or not entries:
            section.refuse(split, f'found {entries!r}, expected a list of "PREFIX" or "WEIGHT PREFIX"')
        splits[split] = tuple(_prefix(section, split, str(entry)) for entry in entries)
    if "train" not in splits:
        section.refuse("train", "missing, expected a list of prefixes of .bin/.idx files")
    return splits


def _prefix(section: Section, split: str, entry: str) -> tuple[float, str]:
    match = re.fullmatch(r"(?:(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s+)?(\S.*)", entry.strip())
    weight = float(match[1] or 1.0) if match else 0.0
    if match is None or not 0 < weight <= LARGEST_SHARE:
        expected = f'"PREFIX" or "WEIGHT PREFIX" with a weight above zero and at most {LARGEST_SHARE:g}'
        section.refuse(split, f"found {entry!r}, expected {expected}")
    prefix = section.path(split, match[2])
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            section.refuse(split, f"{prefix}{suffix} does not exist; make it with btx preprocess")
    return weight, str(prefix)
