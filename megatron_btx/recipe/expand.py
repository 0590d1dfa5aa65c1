"""A recipe's sections expand into the rows of its table of models: a function for each section, and for each baseline.

seed   expert-*   mix ─► btx        variants x seeds of an ablation: a mix for each seed, a row for each pair
average ─► average-finetuned        dense-domains ─► dense        upcycled-mix ─► upcycled-domains ─► upcycled
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import WrapValidator, create_model

from megatron_btx.common.ensembles import WEIGHTINGS, name_ensemble
from megatron_btx.common.plugins import load_plugins
from megatron_btx.common.refusals import refuse, unknown_key
from megatron_btx.mixing.options import DIFFERENCES, MIXTURE, RESULT
from megatron_btx.recipe.budgets import (
    Budget,
    batch_tokens,
    padded_vocabulary,
    token_weighted,
    training_flops,
    training_steps,
)
from megatron_btx.recipe.flags import Flags, FlagValue, merged, number
from megatron_btx.recipe.from_checkpoint import GivenModel
from megatron_btx.recipe.mixture import equal_rows, mixture_shape
from megatron_btx.recipe.models import Ensemble, Given, Mix, ModelSpec, Train
from megatron_btx.recipe.names import (
    AVERAGE_MODEL,
    AVERAGE_STAGE,
    BTX_MODEL,
    DENSE_DOMAINS_STAGE,
    DENSE_MODEL,
    DENSE_STAGE,
    EVALUATE_EXPERTS_STAGE,
    EVALUATION_PREFIX,
    EXPERT_PREFIX,
    FINETUNE_STAGE,
    GENERALIST,
    MIX_MODEL,
    MIX_STAGE,
    SEED_MODEL,
    SEED_STAGE,
)
from megatron_btx.recipe.options import ROWS, option_words, pad_rows, with_options, words_of
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.routing import Routing, check_balancing, read_routing
from megatron_btx.recipe.section import Section
from megatron_btx.recipe.sections import (
    AblationSection,
    DataMatchedSection,
    MergeSection,
    MixSection,
    OneStageSection,
    RecipeSection,
    SettingsSection,
    TrainingSection,
    VariantSection,
)

EVALUATE_DENSE, EVALUATE_MIXTURES = f"{EVALUATION_PREFIX}dense", f"{EVALUATION_PREFIX}moe"
_NEVER = 10**9
"""Steps between two evaluations of which only the one after the last step is wanted."""
_OF_MIXTURES = ("moe-", "expert-", "btx-freeze", "btx-lr-multiplier")
"""Begins the flags that a dense model trained as the mixture does not have."""


@dataclass(frozen=True)
class Baseline:
    """A model that the mixture is compared with: a key of ``baselines``, and the rows that it stands for."""

    section: type[Section]
    """What its key may hold, beside true for all defaults and false."""
    expand: Callable[[Expansion, Any], Iterable[ModelSpec]]
    is_default: Callable[[Recipe], bool] = lambda recipe: False
    """Whether a recipe has it that does not name it."""


class Expansion:
    """A recipe on its way to its table of models.

    Args:
        recipe: without models.
        given: place in the recipe -> what the model that is given there says of itself; empty where nobody needs it.
    """

    def __init__(self, recipe: Recipe, given: Mapping[str, GivenModel]) -> None:
        self.recipe, self.sections, self.given = recipe, recipe.sections, given
        self.rows: dict[str, ModelSpec] = {}
        self.notes: list[str] = []
        self.routing: Routing | None = None
        """Of the mix."""
        self.shape: Flags = {}
        """Flags by which the mixture is not the dense model."""

    def expand(self) -> Recipe:
        """The recipe with its models. Raises InputError with the place, without the file."""
        sections = self.sections
        if sections.ablation is not None:
            self._check_ablation()
        self._add_seed_and_experts()
        if sections.mix is not None:
            self._add_mix(sections.mix)
        if sections.finetune is not None:
            self._add_finetuned(sections.finetune)
        if sections.export and BTX_MODEL not in self.rows:
            refuse("export", "it is of the finetuned mixture; add finetune")
        if sections.ablation is not None:
            self._put_variants(sections.ablation)
        else:
            self._add_baselines()
        self._check_evaluation()
        return replace(self.recipe, models=self.rows, notes=tuple(self.notes))

    def add(self, rows: Iterable[ModelSpec]) -> None:
        """Add rows to the table."""
        for row in rows:
            self.rows[row.name] = row

    def _add_baselines(self) -> None:
        for key, baseline in BASELINES.items():
            asked = getattr(self.sections.baselines, key.replace("-", "_"), None)
            if asked is None and baseline.is_default(self.recipe):
                asked = baseline.section()
            if asked is not None and asked is not False:
                self.add(baseline.expand(self, asked))

    def _add_seed_and_experts(self) -> None:
        seed = self.sections.seed
        row = self._given_or_trained("seed", seed, SEED_MODEL, SEED_STAGE, None)
        meaning = "the model the experts branched from"
        self.add([replace(row, role="seed", meaning=meaning, evaluated_in=EVALUATE_EXPERTS_STAGE)])
        for home, section in self.sections.experts.items():
            place, name = f"experts.{home}", f"{EXPERT_PREFIX}{home}"
            if home not in self.recipe.domains:
                refuse(place, f"an expert is named after its home domain; known: {', '.join(self.recipe.domains)}")
            row = self._given_or_trained(place, section, name, name, SEED_MODEL)
            self.add([replace(row, role="expert", home=home, evaluated_in=EVALUATE_EXPERTS_STAGE)])

    def _given_or_trained(
        self, place: str, section: TrainingSection, name: str, stage: str, start: str | None
    ) -> ModelSpec:
        """The row of a section that trains, or names a checkpoint that takes the training's place."""
        words = option_words(section)
        budget = self._budget(place, section)
        if section.from_ is not None:
            return ModelSpec(name, stage, Given(section.from_, words), "", budget=budget)
        if words:
            refuse(place, f"found {' '.join(words).replace('--', '')}, of a model's import; leave it out, or add from")
        cluster = {SEED_STAGE: "seed", FINETUNE_STAGE: "finetune"}.get(stage, "experts")
        make = Train(start, section.layout, section.megatron, cluster=cluster)
        return ModelSpec(name, stage, make, "", budget=budget)

    def _budget(self, place: str, section: TrainingSection) -> Budget | None:
        """Data and tokens, which may be left out of a given model."""
        is_given = section.from_ is not None
        if is_given and not (section.says("blend") and section.tokens):
            return None
        blend = self._blend(f"{place}.blend", section.blend)
        if section.tokens is None:
            refuse(f"{place}.tokens", "missing, expected a whole number of at least 1 (as 300_000)")
        return Budget(blend, section.tokens)

    def _blend(self, place: str, shares: Mapping[str, float]) -> Mapping[str, float]:
        """The shares, so that they sum to one."""
        domains = self.recipe.domains
        if not shares:
            refuse(place, f"empty; expected shares of some of the domains: {', '.join(domains)}")
        for domain in shares:
            if domain not in domains:
                refuse(f"{place}.{domain}", unknown_key(domain, domains))
        total = sum(shares.values())
        if min(abs(total - 1), abs(total / 100 - 1)) > 1e-9:  # shares, or percent
            self.notes.append(f"{place} sums to {total:g}; normalised to 1")
        return {domain: share / total for domain, share in shares.items()}

    def _add_mix(self, section: MixSection) -> None:
        known, names = [*self.sections.experts, GENERALIST], self.mixed()
        if section.from_ is None and not set(names) <= set(known):
            refuse("mix.experts", f"found {names!r}, expected a list of some of: {', '.join(known)}")
        if section.from_ is None and not self.sections.experts and len(names) > 1:
            refuse("mix", "there are no experts to mix; add experts, or mix: {from: PATH}")
        rows = [self.known_rows(name) for name in names]
        base = padded_vocabulary(self.recipe.model, self.recipe.data.vocabulary_size)
        self.shape = mixture_shape(section, names, self.recipe.model, base, rows)
        self.routing = read_routing("mix", section, number(self.shape, "num-experts"))
        given = {"model": self.sections.model, "training": self.sections.training, "mix.megatron": section.megatron}
        if self.sections.finetune is not None:
            given["finetune.megatron"] = self.sections.finetune.megatron
        check_balancing(section, self.routing, given)
        flags = merged(self.mix_flags, self.shape, self.routing.flags(self.mix_flags))
        router_seed = self.sections.random_seed if section.router_seed is None else section.router_seed
        if section.from_ is not None:
            make: Given | Mix = Given(section.from_, option_words(section))
        else:
            make = Mix(self.sources(), self.router_words(router_seed))
        row = ModelSpec(MIX_MODEL, MIX_STAGE, make, "mix", "the mixture before finetuning", flags=flags)
        self.add([replace(row, evaluated_in=EVALUATE_MIXTURES)])

    @property
    def mix_flags(self) -> Flags:
        """What ``mix.megatron`` says; routers are mixed for fp32, which training has to be told."""
        section = self.sections.mix
        assert section is not None
        if section.from_ is None:
            return dict(section.megatron) | {"moe-router-dtype": section.megatron.get("moe-router-dtype", "fp32")}
        return section.megatron

    def router_words(self, seed: int) -> tuple[str, ...]:
        """The converter's options for a mix whose routers are drawn from ``seed``."""
        assert self.sections.mix is not None and self.routing is not None
        topk = str(self.routing.top_k)
        return ("--router-seed", str(seed), "--moe-router-topk", topk, *option_words(self.sections.mix))

    def sources(self) -> dict[str, str]:
        """Name of an expert in the mix -> its row."""
        return {name: SEED_MODEL if name == GENERALIST else f"{EXPERT_PREFIX}{name}" for name in self.mixed()}

    def mixed(self) -> list[str]:
        """The names in the mix, those of all experts and the seed where there is none."""
        section = self.sections.mix
        if section is not None and section.experts is not None:
            return section.experts
        return [*self.sections.experts, GENERALIST]

    def check_mixed(self, key: str) -> None:
        """Refuse a given mix of experts that the recipe does not have: the baseline ``key`` would lack their data."""
        for name in self.mixed():
            if name != GENERALIST and name not in self.sections.experts:
                remedy = f"name it under experts with its from, blend and tokens, or leave {key} out"
                refuse(f"baselines.{key}", f"the mix has {name}, which is no expert of the recipe; {remedy}")

    def _add_finetuned(self, section: TrainingSection) -> None:
        if MIX_MODEL not in self.rows:
            refuse("finetune", "there is no mix to finetune; add mix: {}")
        row = self._given_or_trained("finetune", section, BTX_MODEL, FINETUNE_STAGE, MIX_MODEL)
        if isinstance(row.make, Train) and self.sections.ablation is None:
            row = replace(row, make=replace(row.make, watch=self.sections.evaluate))
        meaning = "the mixture after finetuning"
        flags = self.rows[MIX_MODEL].flags
        self.add([replace(row, role="btx", meaning=meaning, flags=flags, evaluated_in=EVALUATE_MIXTURES)])

    def known_rows(self, expert: str) -> int | None:
        """Rows of the embedding of an expert that is given; None for one that the run trains, or nobody has read."""
        place = "seed" if expert == GENERALIST else f"experts.{expert}"
        if place not in self.given:
            return None
        return number(self.given[place].model, ROWS)

    def consumed(self, stage: str, budget: Budget, settings: SettingsSection, flags: Flags) -> Budget:
        """The budget of a stage in whole batches, which is what it trains on."""
        given = self.recipe.merge_flags(settings.layout, settings.megatron, flags)
        return Budget(budget.blend, training_steps(stage, budget.tokens, given) * batch_tokens(given))

    def flops(self, key: str, tokens: int, settings: SettingsSection, flags: Flags) -> float:
        """What training on ``tokens`` takes, for the baseline ``key``."""
        given = self.recipe.merge_flags(settings.layout, settings.megatron, flags)
        vocabulary = padded_vocabulary(given, self.recipe.data.vocabulary_size)
        if vocabulary is None:
            refuse(f"baselines.{key}", "its FLOPs need the vocabulary's size; state model.padded-vocab-size")
        return training_flops(given, tokens, vocabulary)

    def budgets_of_mixture(self, key: str) -> tuple[Budget, Budget]:
        """What the mixture saw: its experts' data together, then finetuning's.

        Args:
            key: the baseline that asks, for messages.
        """
        finetune = self.sections.finetune
        if not self.sections.experts or finetune is None:
            refuse(f"baselines.{key}", "its data are those of the experts and of finetune; the recipe lacks one")
        for row in self.rows.values():
            if row.role in ("expert", "btx") and row.budget is None:
                place = "finetune" if row.role == "btx" else f"experts.{row.home}"
                refuse(place, f"baselines.{key} is derived from its blend and tokens; state both beside from")
        self.check_mixed(key)
        mixed, experts = self.mixed(), []
        for row in self.rows.values():
            if row.role == "expert" and row.home in mixed and row.budget is not None:
                experts.append(self.consumed(row.stage, row.budget, self.sections.experts[row.home], {}))
        btx = self.rows[BTX_MODEL]
        assert btx.budget is not None
        return token_weighted(experts), self.consumed(FINETUNE_STAGE, btx.budget, finetune, btx.flags)

    def _check_evaluation(self) -> None:
        """Refuse evaluation sets that are not one, and dense models of several sizes, which one program evaluates."""
        evaluation = self.recipe.evaluation
        if evaluation is None:
            return
        for domain in self.recipe.domains:
            self.recipe.data.evaluation_prefix(domain, evaluation.split)
        rows: dict[str, FlagValue] = {"seed": self.recipe.model.get(ROWS)}
        for name, section in self.sections.experts.items():
            known = self.known_rows(name)
            if known is not None:
                rows[f"experts.{name}"] = pad_rows(known, option_words(section))
        if len({str(found) for found in rows.values() if found is not None}) > 1:
            listed = ", ".join(f"{place} {found}" for place, found in rows.items() if found is not None)
            base = number(self.recipe.model, ROWS)
            own = [self.known_rows(name) or base for name in (GENERALIST, *self.sections.experts)]
            refuse("evaluate", f"it takes models of one number of embedding rows, found {listed}; {equal_rows(own)}")

    def _put_variants(self, ablation: AblationSection) -> None:
        """Variants of finetuning in place of the one: a mix for every seed, and a row for every variant and seed."""
        mix, btx = self.rows.pop(MIX_MODEL), self.rows.pop(BTX_MODEL)
        assert isinstance(mix.make, Mix)
        seeds = {name: variant.seeds or ablation.seeds or [] for name, variant in ablation.variants.items()}
        for seed in sorted(set(itertools.chain.from_iterable(seeds.values()))):
            name = f"{MIX_STAGE}-s{seed}"
            make = replace(mix.make, words=self.router_words(seed))
            self.add([replace(mix, name=name, stage=name, make=make, seed=seed, evaluated_in="")])
            for variant, section in ablation.variants.items():
                if seed in seeds[variant]:
                    self.add([self._vary(btx, variant, section, seed, name)])

    def _vary(self, btx: ModelSpec, variant: str, section: VariantSection, seed: int, start: str) -> ModelSpec:
        """The row of a variant and seed; its losses are measured after its last step alone unless it says more."""
        assert isinstance(btx.make, Train) and btx.budget is not None
        name = f"ablation-{variant}-s{seed}"
        make = replace(
            btx.make,
            start=start,
            layout=section.layout or btx.make.layout,
            last_flags={**self._variant_flags(variant, section), "seed": seed},
            watch=self.recipe.evaluation,
            watch_interval=_NEVER,
        )
        budget = replace(btx.budget, tokens=section.tokens or btx.budget.tokens)
        row = replace(btx, name=name, stage=name, make=make, budget=budget, flags={}, evaluated_in="")
        return replace(row, variant=variant, seed=seed, traits=self._traits(variant, section))

    def _traits(self, name: str, variant: VariantSection) -> dict[str, str]:
        """How a variant is finetuned, in a recipe's words."""
        assert self.routing is not None
        routing = read_routing(f"ablation.variants.{name}", variant, number(self.shape, "num-experts"), self.routing)
        return {
            "routing": routing.method.name,
            "top-k": str(routing.top_k),
            "load-balancing": routing.balancing or "",
            "freeze": " ".join(variant.freeze or ()),
            "tokens": str(variant.tokens or ""),
            "megatron": " ".join(f"{flag}={value}" for flag, value in sorted(variant.megatron.items())),
        }

    def _check_ablation(self) -> None:
        """Refuse what does not go together with an ablation."""
        written = self.sections
        mix, finetune = written.mix, written.finetune
        if mix is None or mix.from_ or finetune is None:
            refuse("ablation", "its variants are of a mix of the recipe's experts and of finetune; add both")
        for key, why in (
            ("evaluate", "every variant is measured on ablation.split and ablation.tokens"),
            ("export", "it has many finetuned mixtures; btx convert-hf export writes any of them"),
        ):
            if written.says(key):
                refuse(key, f"an ablation makes none: {why}; leave it out (of an included recipe by {key}: null)")
        if any(getattr(written.baselines, field) for field in type(written.baselines).model_fields):
            refuse("baselines", "an ablation makes none: its report compares the variants alone; leave them out")
        if finetune.from_:
            refuse("finetune.from", "an ablation finetunes every variant itself; leave it out")
        if mix.router_seed is not None:
            refuse("mix.router-seed", "an ablation draws its routers from ablation.seeds; leave it out")

    def _variant_flags(self, name: str, variant: VariantSection) -> Flags:
        """Of a whole variant: the mix's and finetune's, the routing's, the freeze, its own; false takes a flag back."""
        finetune = self.sections.finetune
        assert self.routing is not None and finetune is not None
        place, experts = f"ablation.variants.{name}", number(self.shape, "num-experts")
        routing = read_routing(place, variant, experts, self.routing)
        check_balancing(variant, routing, {f"{place}.megatron": variant.megatron})
        inherited = {**self.mix_flags, **self.shape, **self.sections.training, **finetune.megatron}
        if self.routing.method.capacity is not None and routing.method != self.routing.method:
            inherited["moe-expert-capacity-factor"] = None
        own = {"num-experts": experts, **variant.megatron, **variant.freeze_flags()}
        return {**inherited, **routing.flags(inherited), **own}


def _average(expansion: Expansion, section: Section) -> Iterable[ModelSpec]:
    """The plain average of the mix's sources, of which the models may differ as the mix's may."""
    if not expansion.sections.experts:
        refuse("baselines.average", "there are no experts to average; add experts")
    expansion.check_mixed("average")
    words = ["--method", "average"]
    if expansion.sections.mix is not None:
        words += words_of(option_words(expansion.sections.mix), RESULT, DIFFERENCES)
    make = Mix(expansion.sources(), tuple(words))
    row = ModelSpec(AVERAGE_MODEL, AVERAGE_STAGE, make, "average", evaluated_in=EVALUATE_DENSE)
    if ROWS in expansion.shape:  # it has the mix's embedding, which is not that of the dense models
        row = replace(row, flags={ROWS: expansion.shape[ROWS]}, evaluated_in=f"{EVALUATION_PREFIX}{AVERAGE_MODEL}")
    yield row


def _dense(expansion: Expansion, section: DataMatchedSection) -> Iterable[ModelSpec]:
    """The seed continued on as many tokens of each domain as the mixture saw."""
    domains, mixture = expansion.budgets_of_mixture("dense")
    as_finetuned = dense_settings(expansion)
    first, second = section.domains or as_finetuned, section.mixture or as_finetuned
    make = Train(SEED_MODEL, first.layout, first.megatron, cluster="dense")
    yield ModelSpec(DENSE_DOMAINS_STAGE, DENSE_DOMAINS_STAGE, make, "dense-domains", budget=domains)
    make = Train(DENSE_DOMAINS_STAGE, second.layout, second.megatron, cluster="dense")
    yield ModelSpec(DENSE_MODEL, DENSE_STAGE, make, "dense", budget=mixture, evaluated_in=EVALUATE_DENSE)


def _average_finetuned(expansion: Expansion, section: OneStageSection) -> Iterable[ModelSpec]:
    """The plain average, finetuned as the mixture is: what finetuning gives without experts."""
    finetune = expansion.sections.finetune
    btx = expansion.rows.get(BTX_MODEL)
    if finetune is None or btx is None or btx.budget is None:
        refuse("baselines.average-finetuned", "it is finetuned as the mixture is; state finetune's blend and tokens")
    if AVERAGE_MODEL not in expansion.rows:
        expansion.add(_average(expansion, Section()))
    flags = expansion.rows[AVERAGE_MODEL].flags
    settings = dense_settings(expansion)
    layout, megatron = section.layout or settings.layout, {**settings.megatron, **section.megatron}
    budget = expansion.consumed(FINETUNE_STAGE, btx.budget, finetune, btx.flags)
    name = "average-finetuned"
    make = Train(AVERAGE_MODEL, layout, megatron, cluster="dense")
    meaning = "the plain average, finetuned on the same data as the mixture"
    row = ModelSpec(name, name, make, name, meaning, budget=budget, flags=flags)
    yield replace(row, evaluated_in=f"{EVALUATION_PREFIX}{name}")


def _upcycled_mix(expansion: Expansion) -> ModelSpec:
    """Copies of the seed as experts (sparse upcycling), before training."""
    routing = expansion.routing
    assert routing is not None
    shape = {name: value for name, value in expansion.shape.items() if name != "moe-ffn-hidden-size"}
    flags = merged(expansion.mix_flags, shape, routing.flags(expansion.mix_flags))
    copies, topk = str(shape["num-experts"]), str(routing.top_k)
    words = ["--method", "upcycle", "--copies", copies, "--router-seed", str(expansion.sections.random_seed)]
    words += ["--moe-router-topk", topk]
    if expansion.sections.mix is not None:
        words += words_of(option_words(expansion.sections.mix), RESULT)
    return ModelSpec(
        "upcycled-mix", "upcycled-mix", Mix({SEED_MODEL: SEED_MODEL}, tuple(words)), "upcycled-mix", flags=flags
    )


def _upcycled(expansion: Expansion, section: DataMatchedSection) -> Iterable[ModelSpec]:
    """Upcycling, trained on as many tokens of each domain as the mixture saw."""
    domains, mixture = expansion.budgets_of_mixture("upcycling")
    finetune = expansion.sections.finetune
    assert finetune is not None
    mix = _upcycled_mix(expansion)
    yield mix
    start = mix.name
    for name, budget, given in (
        ("upcycled-domains", domains, section.domains),
        ("upcycled", mixture, section.mixture),
    ):
        settings = given or finetune
        make = Train(start, settings.layout, settings.megatron)
        row = ModelSpec(name, name, make, name, budget=budget, flags=mix.flags)
        if name == "upcycled":
            meaning = "copies of the seed as experts, trained on the data of the mixture and its experts"
            row = replace(row, meaning=meaning, evaluated_in=f"{EVALUATION_PREFIX}{name}")
        yield row
        start = name


def _upcycled_by_compute(expansion: Expansion, section: OneStageSection) -> Iterable[ModelSpec]:
    """Upcycling, trained on finetuning's data alone for as many FLOPs as experts and mixture took together."""
    key = "upcycling-cm"
    _, mixture = expansion.budgets_of_mixture(key)
    finetune, experts = expansion.sections.finetune, expansion.sections.experts
    assert finetune is not None
    spent = expansion.flops(key, mixture.tokens, finetune, expansion.rows[BTX_MODEL].flags)
    for row in expansion.rows.values():
        if row.role == "expert" and row.home in expansion.mixed() and row.budget is not None:
            own = experts[row.home]
            spent += expansion.flops(key, expansion.consumed(row.stage, row.budget, own, {}).tokens, own, {})
    mix = _upcycled_mix(expansion)
    yield mix
    megatron = {**finetune.megatron, **section.megatron}
    settings = SettingsSection.model_construct(layout=section.layout or finetune.layout, megatron=megatron)
    tokens = round(spent / expansion.flops(key, 1, settings, mix.flags))
    name = "upcycled-cm"
    make = Train(mix.name, settings.layout, settings.megatron)
    meaning = "copies of the seed as experts, trained as long as experts and mixture together by FLOPs"
    row = ModelSpec(name, name, make, name, meaning, budget=Budget(mixture.blend, tokens), flags=mix.flags)
    yield replace(row, evaluated_in=f"{EVALUATION_PREFIX}{name}")


def _merged(expansion: Expansion, section: MergeSection) -> Iterable[ModelSpec]:
    """Branch-Train-Merge of the mix's sources: a row for each number of experts and way of weighing them."""
    members: dict[str, Mapping[str, float]] = {}
    for name in expansion.mixed():
        if name not in expansion.sections.experts and name != GENERALIST:
            refuse("baselines.btm", f"the mix has {name}, which is no expert of the recipe; leave it out")
        row = expansion.rows[SEED_MODEL if name == GENERALIST else f"{EXPERT_PREFIX}{name}"]
        members[row.name] = row.budget.blend if row.budget else _assumed_blend(expansion, row)
    if len(members) < 2:
        refuse("baselines.btm", "there are no experts to merge; add experts")
    for k, weights in itertools.product(sorted(set(section.top_k)), dict.fromkeys(section.weights)):
        if k > len(members):
            refuse(
                "baselines.btm.top-k", f"found {k}, expected at most {len(members)}, the number of models in the mix"
            )
        meaning = f"{k} of the experts at once, {WEIGHTINGS[weights].meaning}; no training"
        row = ModelSpec(name_ensemble(weights, k), "", Ensemble(members, weights, k), "btm", meaning)
        yield replace(row, evaluated_in=EVALUATE_EXPERTS_STAGE)


def _assumed_blend(expansion: Expansion, row: ModelSpec) -> Mapping[str, float]:
    """What a given model is taken to be trained on where nothing says it: its home, or all domains alike."""
    domains = expansion.recipe.domains
    return {row.home: 1.0} if row.home else dict.fromkeys(domains, 1 / len(domains))


def dense_settings(expansion: Expansion) -> SettingsSection:
    """Layout and flags of finetuning without what only mixtures have."""
    finetune = expansion.sections.finetune
    assert finetune is not None
    without = {"expert_model_parallel_size": None, "expert_tensor_parallel_size": None}
    layout = finetune.layout.model_copy(update=without)
    megatron = {name: value for name, value in finetune.megatron.items() if not name.startswith(_OF_MIXTURES)}
    return SettingsSection.model_construct(layout=layout, megatron=megatron)


def has_given_experts(recipe: Recipe) -> bool:
    """Whether a mix is made of models that the user has, so that finetuning is all that the run trains."""
    sections = recipe.sections
    finetune, mix, experts = sections.finetune, sections.mix, sections.experts.values()
    if finetune is None or finetune.from_ or mix is None or mix.from_ or recipe.evaluation is None:
        return False
    return bool(experts) and all(expert.from_ for expert in experts)


BASELINES: dict[str, Baseline] = {
    "average": Baseline(Section, _average),
    "average-finetuned": Baseline(OneStageSection, _average_finetuned, has_given_experts),
    "dense": Baseline(DataMatchedSection, _dense),
    "upcycling": Baseline(DataMatchedSection, _upcycled),
    "upcycling-cm": Baseline(OneStageSection, _upcycled_by_compute),
    "btm": Baseline(MergeSection, _merged),
}
"""Key of the section ``baselines`` -> what it stands for. One more is one more row."""


def _read_baseline(said: object, read: Callable[[object], object]) -> object:
    """true takes every default, and false is none also where it would be one by default."""
    if said is False:
        return said
    return read({} if said is True else said)


def recipe_section() -> type[RecipeSection]:
    """The form of a recipe, with a key for every baseline and every option of mixing, other packages' too."""
    load_plugins()
    fields: dict[str, Any] = {}
    for key, baseline in BASELINES.items():
        section: Any = baseline.section
        fields[key.replace("-", "_")] = (Annotated[section | None, WrapValidator(_read_baseline)], None)
    baselines = create_model("BaselinesSection", __base__=Section, **fields)
    mix: Any = with_options(RESULT, DIFFERENCES, MIXTURE)(MixSection)
    return create_model(
        "RecipeSection", __base__=RecipeSection, baselines=(baselines, baselines()), mix=(mix | None, None)
    )
