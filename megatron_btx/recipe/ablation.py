"""The ablation of a recipe: variants of finetuning, each over several seeds, from the same experts.

    mix-s1 -> ablation-top2-s1, ablation-soft-s1, ...        and so for every seed

A variant says what differs from ``mix`` and ``finetune`` in a few words. The seed draws the routers of the mix and
shuffles the data; the experts are trained once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_btx.recipe.errors import refuse
from megatron_btx.recipe.flags import Flags, FlagValue
from megatron_btx.recipe.routing import Routing, check_balancing, read_routing
from megatron_btx.recipe.sections import AblationSection, EvaluateSection, VariantSection


@dataclass(frozen=True)
class Variant:
    """One way to finetune."""

    name: str
    seeds: tuple[int, ...]
    tokens: int | None
    """None: as finetune."""
    flags: Flags
    """Of the whole variant: the mix's and finetune's, the routing's, the freeze, its own; false takes a flag back."""


@dataclass(frozen=True)
class Ablation:
    """What is compared, and the text it is compared on."""

    variants: tuple[Variant, ...]
    evaluation: EvaluateSection
    """Of every variant, after its last step."""

    def seeds(self) -> list[int]:
        """Every seed that some variant uses."""
        return sorted({seed for variant in self.variants for seed in variant.seeds})


def stage_name(variant: str, seed: int) -> str:
    """The stage that finetunes one variant with one seed."""
    return f"ablation-{variant}-s{seed}"


def read_ablation(section: AblationSection, given: Flags, base: Routing, experts: int) -> Ablation:
    """The recipe's section ``ablation``.

    Args:
        given: flags of mix and finetune, which every variant has unless it says otherwise.
        base: the routing of mix, likewise.

    Raises:
        InputError: the place, what was found, what was expected.
    """
    seeds = _read_seeds("ablation.seeds", section.seeds)
    if not section.variants:
        refuse(
            "ablation.variants",
            "missing, expected names with what differs from mix and finetune, as soft: {routing: soft}",
        )
    variants = []
    for name, variant in section.variants.items():
        place = f"ablation.variants.{name}"
        flags = _read_flags(place, variant, given, base, experts)
        own_seeds = seeds
        if variant.seeds is not None:
            own_seeds = _read_seeds(f"{place}.seeds", variant.seeds)
        variants.append(Variant(name, own_seeds, variant.tokens, flags))
    return Ablation(tuple(variants), EvaluateSection(split=section.split, tokens=section.tokens))


def freeze_flags(variant: VariantSection) -> dict[str, FlagValue]:
    """What ``freeze: [...]`` says; an empty list takes back what finetune says."""
    if variant.freeze is None:
        return {}
    return {"btx-freeze": tuple(variant.freeze) or False}


def _read_seeds(place: str, seeds: list[int] | None) -> tuple[int, ...]:
    if seeds is None:
        refuse(place, "missing, expected a list of whole numbers above zero, as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        refuse(place, f"found {seeds!r}, expected every seed once")
    return tuple(seeds)


def _read_flags(place: str, variant: VariantSection, given: Flags, base: Routing, experts: int) -> Flags:
    routing = read_routing(place, variant, experts, base)
    check_balancing(variant, routing, {f"{place}.megatron": variant.megatron})
    if variant.freeze is not None and "btx-freeze" in variant.megatron:
        refuse(f"{place}.freeze", "megatron.btx-freeze says it a second time; leave one of them out")
    inherited = dict(given)
    has_capacity_of_the_mix = base.method.capacity is not None
    if has_capacity_of_the_mix and routing.method != base.method:
        inherited["moe-expert-capacity-factor"] = None
    return {
        **inherited,
        **routing.flags(inherited),
        "num-experts": experts,
        **variant.megatron,
        **freeze_flags(variant),
    }
