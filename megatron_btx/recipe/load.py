"""From a YAML file to the typed recipe: what is written is validated section by section, then as a whole.

Everything unknown is refused, with the place, the close match and what is known there: a setting that is silently
ignored costs a training run. Relative paths count from the directory in which the command is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_btx.common.errors import InputError
from megatron_btx.recipe.ablation import freeze_flags, read_ablation
from megatron_btx.recipe.budgets import padded_vocabulary
from megatron_btx.recipe.checks import check_whole
from megatron_btx.recipe.data import choose_domains, read_data
from megatron_btx.recipe.errors import describe, refuse, unknown_key
from megatron_btx.recipe.flags import Flags, number
from megatron_btx.recipe.from_checkpoint import GivenModel, is_loadable, read_models
from megatron_btx.recipe.mixture import check_rows, known_rows, mixture_shape
from megatron_btx.recipe.names import GENERALIST
from megatron_btx.recipe.options import ROWS, option_words, pad_rows
from megatron_btx.recipe.routing import check_balancing, read_routing
from megatron_btx.recipe.schema import Mix, Recipe, Training
from megatron_btx.recipe.section import Section
from megatron_btx.recipe.sections import (
    LayoutSection,
    MixSection,
    RecipeSection,
    TrainingSection,
    VariantSection,
)
from megatron_btx.recipe.yaml import check_values, load_tree

_FLAG_SECTIONS = ("tokenizer", "model", "training", "megatron")
_SMALLEST_SHARE = 1e-9
"""No run reads a sequence of less."""


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file ``path`` with ``changes`` applied, each a dotted KEY=VALUE, as ``seed.tokens=1000``.

    Raises:
        InputError: the file, the place in it, what was found, what was expected.
    """
    return parse_recipe(load_tree(Path(path), changes), str(path))


def parse_recipe(tree: Mapping[str, Any], file: str) -> Recipe:
    """Check ``tree`` and make a Recipe of it. Raises InputError with the place, what was found, what was expected."""
    try:
        check_values(tree)
        return _Builder(RecipeSection.model_validate(tree), file, tree).recipe()
    except ValidationError as error:
        raise InputError(f"{file}: {describe(error, RecipeSection)}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


class _Builder:
    """Makes the typed recipe of what is written."""

    def __init__(self, written: RecipeSection, file: str, tree: Mapping[str, Any]) -> None:
        self.written, self.file, self.tree = written, file, tree
        self.given = self._read_given()
        self.data = read_data(written.data, self.given["seed"].tokenizer if "seed" in self.given else {})
        self.domains = choose_domains(written.domains, self.data.names())
        self.notes: list[str] = []

    def recipe(self) -> Recipe:
        """The recipe. Raises InputError with the place, without the file."""
        written = self.written
        experts = self._experts()
        mix = None
        if written.mix is not None:
            mix = self._mix(written.mix, tuple(experts))
        finetune = None
        if written.finetune is not None:
            finetune = self._training("finetune", written.finetune)
        ablation = None
        if written.ablation is not None and mix is not None:
            given = {**mix.megatron, **mix.shape, **written.training}
            if finetune is not None:
                given |= finetune.megatron
            ablation = read_ablation(written.ablation, given, mix.routing, number(mix.shape, "num-experts"))
        recipe = Recipe(
            file=self.file,
            name=written.name or self._name_of_file(),
            random_seed=written.random_seed,
            data=self.data,
            model=self._model(),
            training=written.training,
            domains=self.domains,
            seed=self._training("seed", written.seed),
            experts=experts,
            mix=mix,
            finetune=finetune,
            average=written.baselines.average,
            dense=written.baselines.dense,
            evaluate=written.evaluate,
            ablation=ablation,
            export=written.export,
            cluster=written.cluster,
            flag_sections=list_flag_sections(written),
            notes=tuple(self.notes),
            tree=self.tree,
        )
        check_whole(recipe, written)
        if recipe.evaluate or recipe.ablation:
            check_rows(recipe, self.given)
        return recipe

    def _read_given(self) -> Mapping[str, GivenModel]:
        """What the given models say of themselves, the seed first; empty where nobody needs to know.

        That is where the recipe states the model and the tokenizer itself, and Megatron can start from all of them.
        """
        written = self.written
        stages: dict[str, TrainingSection | MixSection | None] = {"seed": written.seed}
        stages |= {f"experts.{name}": expert for name, expert in written.experts.items()}
        stages |= {"mix": written.mix, "finetune": written.finetune}
        paths = {}
        for place, section in stages.items():
            if section is not None and section.from_ is not None:
                paths[place] = section.from_
        data = written.data
        needs_tokenizer = data.says("domains") and "tokenizer-type" not in data.tokenizer and "seed" in paths
        needs_model = "num-layers" not in written.model
        loadable = all(is_loadable(path) for path in paths.values())
        if not paths or (loadable and not needs_model and not needs_tokenizer):
            return {}
        return read_models(paths)

    def _model(self) -> Flags:
        """The dense model's flags: what the seed says, else the first expert, and what the recipe says."""
        for place, given in self.given.items():
            if place == "seed" or place.startswith("experts."):
                section = self.written.seed if place == "seed" else self.written.experts[place.removeprefix("experts.")]
                rows = {ROWS: str(pad_rows(number(given.model, ROWS), option_words(section)))}
                return {**given.model, **rows, **self.written.model}
        return self.written.model

    def _name_of_file(self) -> str:
        """The run's name where the recipe gives none; checked as a given one is."""
        checked = RecipeSection.model_validate({"name": Path(self.file).stem})
        assert checked.name is not None
        return checked.name

    def _experts(self) -> dict[str, Training]:
        experts = {}
        for name, section in self.written.experts.items():
            place = f"experts.{name}"
            if name not in self.domains:
                refuse(place, f"an expert is named after its home domain; known: {', '.join(self.domains)}")
            experts[name] = self._training(place, section)
        return experts

    def _training(self, place: str, section: TrainingSection) -> Training:
        """A stage that trains; of a given checkpoint, data and budget may be left out."""
        trains = section.from_ is None
        blend: Mapping[str, float] = {}
        if trains or section.says("blend"):
            blend = self._blend(f"{place}.blend", section.blend)
        if trains and section.tokens is None:
            refuse(f"{place}.tokens", "missing, expected a whole number of at least 1 (as 300_000)")
        words = option_words(section)
        if trains and words:
            refuse(place, f"found {' '.join(words).replace('--', '')}, of a model's import; leave it out, or add from")
        return Training(section.from_, blend, section.tokens or 0, section.layout, section.megatron, words)

    def _blend(self, place: str, shares: Mapping[str, float]) -> Mapping[str, float]:
        """The shares, so that they sum to one."""
        if not shares:
            refuse(place, f"empty; expected shares of some of the domains: {', '.join(self.domains)}")
        for domain in shares:
            if domain not in self.domains:
                refuse(f"{place}.{domain}", unknown_key(domain, self.domains))
        total = sum(shares.values())
        if min(abs(total - 1), abs(total / 100 - 1)) > 1e-9:  # shares, or percent
            self.notes.append(f"{place} sums to {total:g}; normalised to 1")
        for domain, share in shares.items():
            if share / total < _SMALLEST_SHARE:
                found = f"found {share!r} of {total:g}, less than {_SMALLEST_SHARE:g} of it"
                refuse(f"{place}.{domain}", f"{found}; leave it out")
        return {domain: share / total for domain, share in shares.items()}

    def _mix(self, section: MixSection, experts: tuple[str, ...]) -> Mix:
        known = [*experts, GENERALIST]
        names = known if section.experts is None else section.experts
        if section.from_ is None and not set(names) <= set(known):
            refuse("mix.experts", f"found {names!r}, expected a list of some of: {', '.join(known)}")
        words = option_words(section)
        rows = [known_rows(self.given, name) for name in names]
        base = padded_vocabulary(self._model(), self.data.vocabulary_size)
        shape = mixture_shape(section, names, self._model(), base, rows)
        routing = read_routing("mix", section, number(shape, "num-experts"))
        written = self.written
        flags = {"model": written.model, "training": written.training, "mix.megatron": section.megatron}
        if written.finetune is not None:
            flags["finetune.megatron"] = written.finetune.megatron
        check_balancing(section, routing, flags)
        router_seed = written.random_seed if section.router_seed is None else section.router_seed
        return Mix(section.from_, tuple(names), router_seed, routing, _mixture_flags(section), words, shape)


def _mixture_flags(section: MixSection) -> Flags:
    """The mixture's flags; its routers are mixed for fp32, which training has to be told."""
    flags = dict(section.megatron)
    if section.from_ is None:
        flags.setdefault("moe-router-dtype", "fp32")
    return flags


def list_flag_sections(written: Section, place: str = "") -> dict[str, Flags]:
    """Place in the recipe -> the flags that are written there, for the check of their names by Megatron's parser."""
    sections: dict[str, Flags] = {}
    for name, field in type(written).model_fields.items():
        value, below = getattr(written, name), f"{place}{field.alias}"
        if isinstance(value, LayoutSection):
            sections[below] = value.flags()
        elif isinstance(value, Section):
            sections |= list_flag_sections(value, f"{below}.")
        elif name in _FLAG_SECTIONS:
            sections[below] = value
        elif isinstance(value, dict):
            for key, section in value.items():
                if isinstance(section, Section):
                    sections |= list_flag_sections(section, f"{below}.{key}.")
    if isinstance(written, VariantSection):
        sections[f"{place}freeze"] = freeze_flags(written)
    return {where: flags for where, flags in sections.items() if flags}
