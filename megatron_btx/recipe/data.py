"""The data of a recipe: texts of which the run makes datasets, or given datasets (prefixes of .bin/.idx files)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_btx.common.refusals import refuse
from megatron_btx.data.domains import Domain
from megatron_btx.recipe.flags import Flags
from megatron_btx.recipe.names import DATA_STAGE
from megatron_btx.recipe.sections import DataSection
from megatron_btx.recipe.values import absolute_path
from megatron_btx.tokenizers.vocabulary import read_vocabulary


@dataclass(frozen=True)
class Data:
    """Domains whose datasets or texts are given."""

    domains: Mapping[str, Mapping[str, tuple[tuple[float, str], ...]]]
    """Domain -> split -> (weight, prefix) of each dataset: absolute, or relative to the run where the run makes it."""
    tokenizer: Flags
    texts: Mapping[str, Domain]
    """Of those domains whose datasets the run makes; their paths are absolute."""
    workers: int
    """Processes that make datasets of texts; 0 where all datasets are given."""
    seed: int

    def are_made(self) -> bool:
        """Whether a stage of the run makes data."""
        return bool(self.texts)

    @cached_property
    def vocabulary_size(self) -> int | None:
        """Rows that the tokenizer's files give a token to; None where they do not lie here or cannot be read."""
        vocabulary = read_vocabulary({flag.replace("-", "_"): value for flag, value in self.tokenizer.items()})
        if vocabulary is None:
            return None
        return max(vocabulary.tokens, default=-1) + 1

    def list_prefixes(self, domain: str, split: str) -> tuple[tuple[float, str], ...]:
        """(weight, prefix) of a domain's datasets."""
        return self.domains[domain].get(split, ())

    def evaluation_prefix(self, domain: str, split: str) -> str:
        """The one prefix of a domain's evaluation set. Raises InputError where there are more, or none."""
        prefixes = self.list_prefixes(domain, split)
        if len(prefixes) != 1:
            place = f"data.domains.{domain}.{split}"
            refuse(place, f"found {len(prefixes)} prefixes, expected one: it is the domain's evaluation set")
        return prefixes[0][1]

    def blend_words(self, blend: Mapping[str, float], split: str) -> tuple[str, ...] | None:
        """Weights and prefixes for Megatron's --<split>-data-path, or None when a domain has no such split."""
        words: list[str] = []
        for domain, share in blend.items():
            prefixes = self.list_prefixes(domain, split)
            if not prefixes:
                return None
            total = sum(weight for weight, _ in prefixes)
            for weight, prefix in prefixes:
                words += [f"{share * weight / total:.10g}", prefix]
        return tuple(words)

    def is_made(self, path: str) -> bool:
        """Whether ``path`` lies in the folder of the stage that makes the run's data."""
        return self.are_made() and Path(path).parts[:1] == (DATA_STAGE,)


def read_data(section: DataSection, own_tokenizer: Flags) -> Data:
    """The section ``data``.

    Args:
        own_tokenizer: the given seed's, for data that state none.

    Raises:
        InputError: the place, what was found, what was expected.
    """
    texts = section.texts()
    domains: dict[str, Mapping[str, tuple[tuple[float, str], ...]]] = {}
    for name, domain in section.domains.items():
        if name in texts:
            domains[name] = {split: ((1.0, f"{DATA_STAGE}/{name}.{split}"),) for split in texts[name].splits()}
        else:
            domains[name] = {split: tuple(prefixes) for split, prefixes in domain.given_splits().items()}
    tokenizer = _read_tokenizer(section, own_tokenizer)
    return Data(domains, tokenizer, texts, section.workers if texts else 0, section.seed)


def choose_domains(listed: list[str] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """The domains that a recipe uses, in its order; all of ``names`` where it lists none."""
    if listed is None:
        return names
    if not listed or not set(listed) <= set(names):
        refuse("domains", f"found {listed!r}, expected a list of some of: {', '.join(names)}")
    if len(set(listed)) < len(listed):
        refuse("domains", f"found {listed!r}, expected every domain once")
    return tuple(listed)


def _read_tokenizer(section: DataSection, own: Flags) -> Flags:
    """Megatron's tokenizer flags; a tokenizer that lies here by its absolute path."""
    tokenizer = dict(section.tokenizer or own)
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
        refuse("data.tokenizer", f"tokenizer-model {model} does not exist; say where the tokenizer lies")
    return tokenizer
