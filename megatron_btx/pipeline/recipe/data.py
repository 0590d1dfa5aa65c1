"""The data of a recipe: corpora that the run makes, or datasets that are given, and the domains' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_btx.pipeline.recipe.flags import Flags, FlagValue
from megatron_btx.pipeline.recipe.refusals import refuse

if TYPE_CHECKING:
    from megatron_btx.pipeline.recipe.written import DataSection, DomainSection

QUICKSTART_DOMAINS = ("general", "math", "code", "knowledge")
Splits = Mapping[str, tuple[tuple[float, str], ...]]
"""Split -> (weight, absolute prefix) of each dataset."""


@dataclass(frozen=True)
class Data:
    """Either corpora that the run makes, or prefixes of existing .bin/.idx files per domain."""

    corpora: Flags
    """Flags of ``btx corpora``; empty when the data are given."""
    workers: int
    domains: Mapping[str, Splits]
    """Empty when the run makes its corpora."""
    tokenizer: Flags

    def names(self) -> tuple[str, ...]:
        """Every domain that there is text of."""
        if self.corpora:
            return QUICKSTART_DOMAINS
        return tuple(self.domains)


def read_data(section: DataSection) -> Data:
    """The section ``data``. Raises InputError with the place, what was found, what was expected."""
    if section.says("corpora") == section.says("domains"):
        refuse("data", "expected either corpora: quickstart (made by the run) or domains: (.bin/.idx files)")
    if section.says("corpora"):
        return _read_corpora(section)
    for field, key in (("vocab_size", "vocab-size"), ("workers", "workers"), ("seed", "seed"), ("scale", "scale")):
        if section.says(field):
            refuse(f"data.{key}", "only for corpora that the run makes; a given tokenizer goes under tokenizer")
    domains = {name: _read_splits(domain) for name, domain in section.domains.items()}
    return Data({}, 0, domains, _read_tokenizer(section))


def choose_domains(listed: list[str] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """The domains that a recipe uses, in its order; all of ``names`` where it lists none."""
    if listed is None:
        return names
    if not listed or not set(listed) <= set(names):
        refuse("domains", f"found {listed!r}, expected a list of some of: {', '.join(names)}")
    if len(set(listed)) < len(listed):
        refuse("domains", f"found {listed!r}, expected every domain once")
    return tuple(listed)


def _read_corpora(section: DataSection) -> Data:
    """Corpora that the run makes, and the tokenizer that it trains on them."""
    if section.says("tokenizer"):
        refuse("data.tokenizer", "found beside corpora, on which a tokenizer is trained; leave it out")
    if section.vocab_size is None:
        refuse("data.vocab-size", "missing, expected the number of the tokenizer's tokens, as 2048")
    corpora: dict[str, FlagValue] = {"vocab-size": section.vocab_size, "workers": section.workers}
    if section.seed is not None:
        corpora["seed"] = section.seed
    if section.scale is not None:
        corpora["scale"] = section.scale
    tokenizer = {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "data/tokenizer.model"}
    return Data(corpora, section.workers, {}, tokenizer)


def _read_splits(domain: DomainSection) -> Splits:
    splits = {"train": tuple(domain.train)}
    if domain.valid is not None:
        splits["valid"] = tuple(domain.valid)
    if domain.test is not None:
        splits["test"] = tuple(domain.test)
    return splits


def _read_tokenizer(section: DataSection) -> Flags:
    """Megatron's tokenizer flags; a tokenizer that lies here by its absolute path."""
    from megatron_btx.pipeline.recipe.written import absolute_path

    tokenizer = dict(section.tokenizer)
    kind = tokenizer.get("tokenizer-type")
    if kind is None:
        refuse("data.tokenizer", "missing tokenizer-type; expected Megatron's tokenizer flags for these data")
    model = tokenizer.get("tokenizer-model")
    if model is None:
        return tokenizer
    path = absolute_path(model)
    if path.exists():
        tokenizer["tokenizer-model"] = str(path)
    elif kind != "HuggingFaceTokenizer":  # whose model may be a name that transformers knows
        refuse("data.tokenizer", f"tokenizer-model {model} does not exist")
    return tokenizer
