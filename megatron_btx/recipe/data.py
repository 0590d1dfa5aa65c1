"""The data of a recipe: texts of which the run makes datasets, or datasets that are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_btx.data.domains import Domain
from megatron_btx.recipe.errors import refuse
from megatron_btx.recipe.flags import Flags
from megatron_btx.recipe.names import DATA_STAGE, SPLITS
from megatron_btx.tokenizers.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from megatron_btx.recipe.sections import DataSection, DomainSection, SharesSection, TextSection

Splits = Mapping[str, tuple[tuple[float, str], ...]]
"""Split -> (weight, absolute prefix) of each dataset."""


_SEED = 1234
"""Draws which documents go to which split, where the recipe does not say it."""


@dataclass(frozen=True)
class Data:
    """Domains whose datasets or texts are given."""

    workers: int
    """Processes that make datasets of texts; 0 where all datasets are given."""
    domains: Mapping[str, Splits]
    """Prefixes of datasets that the run makes are relative to its folder."""
    tokenizer: Flags
    texts: Mapping[str, Domain] = field(default_factory=dict)
    """Of those domains whose datasets the run makes; their paths are absolute."""
    seed: int = _SEED
    """Draws which documents go to which split."""

    def names(self) -> tuple[str, ...]:
        """Every domain that there is text of."""
        return tuple(self.domains)

    def are_made(self) -> bool:
        """Whether a stage of the run makes data."""
        return bool(self.texts)

    @cached_property
    def vocabulary_size(self) -> int | None:
        """Rows that the tokenizer's files give a token to; None where they do not lie here or cannot be read."""
        arguments = {flag.replace("-", "_"): value for flag, value in self.tokenizer.items()}
        vocabulary = read_vocabulary(arguments)
        if vocabulary is None:
            return None
        return max(vocabulary.tokens, default=-1) + 1


def read_data(section: DataSection, own_tokenizer: Flags) -> Data:
    """The section ``data``.

    Args:
        own_tokenizer: the given seed's, for data that state none.

    Raises:
        InputError: the place, what was found, what was expected.
    """
    if not section.domains:
        refuse("data.domains", "found none, expected a mapping of domains: NAME: {text: [files or folders]}")
    texts = {}
    for name, domain in section.domains.items():
        if domain.text is not None:
            texts[name] = _read_text(f"data.domains.{name}", domain, domain.text, section.split)
    if not texts:
        _check_unused_keys(section)
    domains: dict[str, Splits] = {}
    for name, domain in section.domains.items():
        if name in texts:
            domains[name] = {split: ((1.0, f"{DATA_STAGE}/{name}.{split}"),) for split in texts[name].splits()}
        else:
            domains[name] = _read_splits(f"data.domains.{name}", domain)
    tokenizer = _read_tokenizer(section, own_tokenizer)
    seed = _SEED if section.seed is None else section.seed
    return Data(section.workers if texts else 0, domains, tokenizer, texts, seed)


def _check_unused_keys(section: DataSection) -> None:
    """Refuse what only texts need, where all datasets are given."""
    if section.split is not None:
        refuse("data.split", "found beside .bin/.idx files, which are split already; leave it out")
    for key in ("workers", "seed"):
        if section.says(key):
            refuse(f"data.{key}", "only for text, of which the run makes datasets; leave it out")


def choose_domains(listed: list[str] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """The domains that a recipe uses, in its order; all of ``names`` where it lists none."""
    if listed is None:
        return names
    if not listed or not set(listed) <= set(names):
        refuse("domains", f"found {listed!r}, expected a list of some of: {', '.join(names)}")
    if len(set(listed)) < len(listed):
        refuse("domains", f"found {listed!r}, expected every domain once")
    return tuple(listed)


def _read_text(place: str, domain: DomainSection, text: TextSection, everywhere: SharesSection | None) -> Domain:
    """Text that is split by shares, or has files for each split."""
    if domain.train or domain.valid or domain.test:
        refuse(f"{place}.text", "found beside .bin/.idx files of the same domain; leave one of them out")
    own = _given_splits(text)
    reading = text.model_dump(by_alias=True, exclude_none=True, include={"json_key", "on_bad_record"})
    if text.files is None:
        if "train" not in own:
            refuse(f"{place}.text", "found no files; expected text: [files or folders], or text: {train: [...], ...}")
        if domain.split is not None:
            refuse(f"{place}.split", "found beside files for every split; leave it out")
        return Domain.model_validate({**own, **reading})
    if own:
        refuse(f"{place}.text", f"found files and {next(iter(own))}; expected one list, or a list for every split")
    written = domain.split or everywhere
    if written is None:
        refuse(f"{place}.split", "missing, expected shares of the documents, as {train: 0.98, valid: 0.01, test: 0.01}")
    shares = _given_splits(written)
    if abs(sum(shares.values()) - 1) > 1e-9:
        where = f"{place}.split" if domain.split else "data.split"
        refuse(where, f"found shares that sum to {sum(shares.values()):g}, expected 1")
    return Domain.model_validate({"text": text.files, "shares": shares, **reading})


def _given_splits(section: DomainSection | TextSection | SharesSection) -> dict[str, Any]:
    """What a section gives for each split: files, or a share."""
    return section.model_dump(include=set(SPLITS), exclude_none=True)


def _read_splits(place: str, domain: DomainSection) -> Splits:
    if domain.split is not None:
        refuse(f"{place}.split", "only for text, of which the run makes datasets; leave it out")
    if domain.train is None:
        refuse(f"{place}.train", "missing, expected a list of prefixes of .bin/.idx files; or text: [files or folders]")
    return {split: tuple(prefixes) for split, prefixes in _given_splits(domain).items()}


def _read_tokenizer(section: DataSection, own: Flags) -> Flags:
    """Megatron's tokenizer flags; a tokenizer that lies here by its absolute path."""
    from megatron_btx.recipe.values import absolute_path

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
