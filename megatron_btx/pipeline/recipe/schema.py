"""The recipe: a YAML file that names the model, the domains and their blends, the budgets, each stage's layout.

Megatron's settings are Megatron's flags; see :mod:`megatron_btx.pipeline.recipe.flags`. Everything unknown is refused,
with the place, the close match and what is known there: a setting that is silently ignored costs a training run.
Relative paths count from the directory in which the command is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.pipeline.recipe.ablation import Ablation, read_ablation
from megatron_btx.pipeline.recipe.data import GENERALIST, LARGEST_SHARE, SPLITS, Data, read_data
from megatron_btx.pipeline.recipe.flags import LAYOUT_FLAGS, Flags
from megatron_btx.pipeline.recipe.reading import LARGEST_SEED, Reader, Section, check_values, load_tree
from megatron_btx.pipeline.recipe.routing import Routing, check_balancing, read_routing

_NAME_LETTERS_AT_MOST = 80
_SMALLEST_SHARE = 1e-9
"""No run reads a sequence of less."""
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Layout:
    """How one stage is spread over this machine."""

    processes: int = 1
    threads: int = 1
    """OMP_NUM_THREADS of each process; on the CPU a stage takes processes x threads cores."""
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One stage that trains, or that is given by a checkpoint (``source``)."""

    source: Path | None
    blend: Mapping[str, float]
    """Domain -> share; sums to one. May be empty only for a given checkpoint."""
    tokens: int
    layout: Layout
    megatron: Flags


@dataclass(frozen=True)
class Mix:
    """The mixing stage, or a given mixed checkpoint."""

    source: Path | None
    experts: tuple[str, ...]
    router_seed: int
    routing: Routing
    megatron: Flags
    """Flags of the MoE model, for finetuning and evaluation alike; those of its routing not among them."""


@dataclass(frozen=True)
class Settings:
    """Layout and flags of a stage whose data and budget are derived."""

    layout: Layout = field(default_factory=Layout)
    megatron: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluate:
    """Loss per domain of every model."""

    split: str
    tokens: int
    """Tokens per domain."""
    settings: Settings


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked as far as one can without Megatron and without looking at the machine."""

    file: str
    name: str
    random_seed: int
    data: Data
    model: Flags
    training: Flags
    domains: tuple[str, ...]
    seed: Training
    experts: Mapping[str, Training]
    mix: Mix | None
    finetune: Training | None
    average: bool
    dense: tuple[Settings, Settings] | None
    """Settings of the dense baseline on the experts' data, then on finetuning's mixture."""
    evaluate: Evaluate | None
    ablation: Ablation | None
    """Variants of finetuning; they take the place of the one finetuning stage."""
    flag_sections: Mapping[str, Flags]
    """Place in the recipe -> the flags that were written there."""
    notes: tuple[str, ...]


_TRAINING_KEYS = ("from", "blend", "tokens", "layout", "megatron")
_RECIPE_KEYS = (
    *("name", "random-seed", "data", "model", "training", "domains"),
    *("seed", "experts", "mix", "finetune", "baselines", "evaluate", "ablation"),
)


def load_recipe(file: Path, changes: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe in ``file`` with ``changes`` (dotted KEY=VALUE) applied, and the YAML mapping that this makes."""
    tree = load_tree(file, changes)
    return parse_recipe(tree, str(file)), tree


def parse_recipe(tree: Mapping[str, Any], file: str) -> Recipe:
    """Check ``tree`` and make a Recipe of it. Raises InputError with the place, what was found, what was expected."""
    reader = Reader(file)
    check_values(tree, "", reader)
    top = Section(tree, "", _RECIPE_KEYS, reader)
    random_seed = top.integer("random-seed", 1234, maximum=LARGEST_SEED)
    name = _slug(top, "name", top.text("name", Path(file).stem))
    data, domains = read_data(top)
    experts_section = top.named("experts")
    experts = {}
    for expert in experts_section.node:
        if expert not in domains:
            experts_section.refuse(expert, f"an expert is named after its home domain; known: {', '.join(domains)}")
        experts[expert] = _training(experts_section.section(expert, _TRAINING_KEYS), domains)
    average, dense = _baselines(top)
    mix = _mix(top, tuple(experts), random_seed)
    training = top.flags("training")
    finetune = _training(top.section("finetune", _TRAINING_KEYS), domains) if "finetune" in top.node else None
    ablation = None
    if mix:
        given = {**mix.megatron, **training, **(finetune.megatron if finetune else {})}
        ablation = read_ablation(top, given, mix.routing, len(mix.experts))
    recipe = Recipe(
        file=file,
        name=name,
        random_seed=random_seed,
        data=data,
        model=top.flags("model"),
        training=training,
        domains=domains,
        seed=_training(top.section("seed", _TRAINING_KEYS), domains),
        experts=experts,
        mix=mix,
        finetune=finetune,
        average=average,
        dense=dense,
        evaluate=_evaluate(top),
        ablation=ablation,
        flag_sections=reader.flag_sections,
        notes=tuple(reader.notes),
    )
    _check_whole(reader, recipe, top.node)
    return recipe


def _training(section: Section, domains: tuple[str, ...]) -> Training:
    source = _source(section)
    told = source is None or "blend" in section.node
    blend = _blend(section, domains) if told else {}
    tokens = section.integer("tokens") if source is None or "tokens" in section.node else 0
    settings = _settings(section)
    return Training(source, blend, tokens, settings.layout, settings.megatron)


def _settings(section: Section) -> Settings:
    layout = section.section("layout", ("processes", "threads", *LAYOUT_FLAGS))
    flags = {name: layout.flag_value(name, layout.node[name]) for name in LAYOUT_FLAGS if name in layout.node}
    if flags:
        section.reader.flag_sections[layout.place] = flags
    spread = Layout(layout.processes("processes", 1), layout.processes("threads", 1), flags)
    return Settings(spread, section.flags("megatron"))


def _blend(section: Section, domains: tuple[str, ...]) -> Mapping[str, float]:
    blend = section.section("blend", domains)
    if not blend.node:
        section.refuse("blend", f"empty; expected shares of some of the domains: {', '.join(domains)}")
    for domain, share in blend.node.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= LARGEST_SHARE:
            expected = f"a number above zero and at most {LARGEST_SHARE:g} (leave the domain out to have none)"
            blend.refuse(domain, f"found {share!r}, expected {expected}")
    total = sum(blend.node.values())
    if min(abs(total - 1), abs(total / 100 - 1)) > 1e-9:  # shares, or percent
        section.reader.notes.append(f"{blend.place} sums to {total:g}; normalised to 1")
    for domain, share in blend.node.items():
        if share / total < _SMALLEST_SHARE:
            blend.refuse(domain, f"found {share!r} of {total:g}, less than {_SMALLEST_SHARE:g} of it; leave it out")
    return {domain: share / total for domain, share in blend.node.items()}


def _source(section: Section) -> Path | None:
    """The checkpoint under ``from``: an absolute path, seen to be a checkpoint's root."""
    if "from" not in section.node:
        return None
    path = section.path("from", section.text("from"))
    if not (path / _TRACKER).is_file():
        found = f"has no {_TRACKER}" if path.is_dir() else "does not exist"
        section.refuse("from", f"{path} {found}; expected the root folder of a Megatron checkpoint")
    return path


def _slug(top: Section, key: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or len(value) > _NAME_LETTERS_AT_MOST:
        expected = f"at most {_NAME_LETTERS_AT_MOST} letters, digits, dots, dashes and underscores"
        top.refuse(key, f"found {value!r}, expected {expected}, the first a letter or digit")
    return value


def _mix(top: Section, experts: tuple[str, ...], random_seed: int) -> Mix | None:
    if "mix" not in top.node:
        return None
    section = top.section("mix", ("from", "experts", "router-seed", "routing", "top-k", "load-balancing", "megatron"))
    names = section.node.get("experts", [*experts, GENERALIST])
    source = _source(section)
    known = {*experts, GENERALIST}
    if not isinstance(names, list) or (source is None and not set(map(str, names)) <= known):
        section.refuse("experts", f"found {names!r}, expected a list of some of: {', '.join([*experts, GENERALIST])}")
    if len(names) < 2 or len(set(map(str, names))) < len(names):
        section.refuse("experts", f"found {names!r}, expected at least two different experts")
    routing, flags = read_routing(section, len(names)), section.flags("megatron")
    everywhere = {"model": top.flags("model"), "training": top.flags("training"), f"{section.place}.megatron": flags}
    if "finetune" in top.node:
        everywhere["finetune.megatron"] = top.section("finetune").flags("megatron")
    check_balancing(section, routing, everywhere)
    router_seed = section.integer("router-seed", random_seed, minimum=0)
    return Mix(source, tuple(map(str, names)), router_seed, routing, flags)


def _baselines(top: Section) -> tuple[bool, tuple[Settings, Settings] | None]:
    section = top.section("baselines", ("average", "dense"))
    average = section.node.get("average", False)
    if not isinstance(average, bool):
        section.refuse("average", f"found {average!r}, expected true or false")
    if "dense" not in section.node:
        return average, None
    dense = section.section("dense", ("domains", "mixture"))
    domains, mixture = (_settings(dense.section(key, ("layout", "megatron"))) for key in ("domains", "mixture"))
    return average, (domains, mixture)


def _evaluate(top: Section) -> Evaluate | None:
    if "evaluate" not in top.node:
        return None
    section = top.section("evaluate", ("split", "tokens", "layout", "megatron"))
    split = section.text("split", "valid")
    if split not in SPLITS[1:]:
        section.refuse("split", f"found {split!r}, expected valid or test")
    return Evaluate(split, section.integer("tokens"), _settings(section))


def _check_whole(reader: Reader, recipe: Recipe, top: Mapping[str, Any]) -> None:
    """What only the parts together can violate."""
    if recipe.finetune and not recipe.mix:
        reader.refuse("finetune", "there is no mix to finetune; add mix: {}")
    if recipe.mix and not recipe.mix.source and not recipe.experts:
        reader.refuse("mix", "there are no experts to mix; add experts, or mix: {from: PATH}")
    if "ablation" in top and not (recipe.mix and not recipe.mix.source and recipe.finetune):
        reader.refuse("ablation", "its variants are of a mix of the recipe's experts and of finetune; add both")
    if recipe.ablation:
        _check_ablation(reader, recipe, top)
    if recipe.average and not recipe.experts:
        reader.refuse("baselines.average", "there are no experts to average; add experts")
    missing = [name for name in recipe.mix.experts if name not in (*recipe.experts, GENERALIST)] if recipe.mix else []
    if recipe.average and missing:
        reader.refuse("baselines.average", f"the mix has {missing[0]}, which is no expert of the recipe; leave it out")
    if recipe.dense:
        parts = {f"experts.{name}": expert for name, expert in recipe.experts.items()}
        if not parts or not recipe.finetune:
            reader.refuse("baselines.dense", "its data are those of the experts and of finetune; the recipe lacks one")
        for place, part in {**parts, "finetune": recipe.finetune}.items():
            if not part.blend or not part.tokens:
                reader.refuse(place, "baselines.dense is derived from its blend and tokens; state both beside from")
    if recipe.evaluate:
        for domain in recipe.domains if recipe.data.domains else ():
            prefixes = recipe.data.domains[domain].get(recipe.evaluate.split, ())
            if len(prefixes) != 1:
                place = f"data.domains.{domain}.{recipe.evaluate.split}"
                reader.refuse(place, f"found {len(prefixes)} prefixes, expected one: it is the domain's evaluation set")


def _check_ablation(reader: Reader, recipe: Recipe, top: Mapping[str, Any]) -> None:
    """Refuse what an ablation would pass over in silence."""
    for key, why in (
        ("evaluate", "every variant is measured on ablation.split and ablation.tokens"),
        ("baselines", "its report compares the variants alone"),
    ):
        if key in top:
            reader.refuse(key, f"an ablation makes none: {why}; leave it out (of an included recipe by {key}: null)")
    if recipe.finetune and recipe.finetune.source:
        reader.refuse("finetune.from", "an ablation finetunes every variant itself; leave it out")
    if top["mix"].get("router-seed") is not None:
        reader.refuse("mix.router-seed", "an ablation draws its routers from ablation.seeds; leave it out")
