"""The ablation of a recipe: variants of finetuning, each over several seeds, from the same experts.

    mix-s1 -> ablation-top2-s1, ablation-soft-s1, ...        and so for every seed

A variant says what differs from ``mix`` and ``finetune`` in a few words. The seed draws the routers of the mix and
shuffles the data; the experts are trained once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_btx.pipeline.recipe.flags import Flags, FlagValue
from megatron_btx.pipeline.recipe.reading import LARGEST_SEED, Section
from megatron_btx.pipeline.recipe.routing import Routing, check_balancing, read_routing

_VARIANT_KEYS = ("routing", "top-k", "load-balancing", "freeze", "tokens", "megatron", "seeds")


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
    split: str
    valid_tokens: int
    """Tokens per domain, measured after the last step."""

    def seeds(self) -> list[int]:
        """Every seed that some variant uses."""
        return sorted({seed for variant in self.variants for seed in variant.seeds})


def stage_name(variant: str, seed: int) -> str:
    """The stage that finetunes one variant with one seed."""
    return f"ablation-{variant}-s{seed}"


def read_ablation(top: Section, given: Flags, base: Routing, experts: int) -> Ablation | None:
    """The recipe's section ``ablation``.

    Args:
        given: flags of mix and finetune, which every variant has unless it says otherwise.
        base: the routing of mix, likewise.

    Raises:
        InputError: the place, what was found, what was expected.
    """
    if "ablation" not in top.node:
        return None
    section = top.section("ablation", ("seeds", "split", "tokens", "variants"))
    seeds = _seeds(section, ())
    split = section.text("split", "valid")
    if split not in ("valid", "test"):
        section.refuse("split", f"found {split!r}, expected valid or test")
    listed = section.named("variants")
    if not listed.node:
        section.refuse(
            "variants", "missing, expected names with what differs from mix and finetune, as soft: {routing: soft}"
        )
    listed.check_names()
    variants = []
    for name in listed.node:
        if not name.replace("-", "").isalnum():
            listed.refuse(name, "expected a name of letters, digits and dashes")
        variants.append(_variant(listed.section(name, _VARIANT_KEYS), name, seeds, given, base, experts))
    return Ablation(tuple(variants), split, section.integer("tokens", 65_536))


def _seeds(section: Section, inherited: tuple[int, ...]) -> tuple[int, ...]:
    seeds = section.node.get("seeds", list(inherited))
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 < s <= LARGEST_SEED for s in seeds):
        expected = "a list of whole numbers above zero and less than 2**32, as [1, 2, 3]"
        section.refuse("seeds", f"found {seeds!r}, expected {expected}")
    if len(set(seeds)) < len(seeds):
        section.refuse("seeds", f"found {seeds!r}, expected every seed once")
    return tuple(seeds)


def _variant(section: Section, name: str, seeds: tuple[int, ...], given: Flags, base: Routing, experts: int) -> Variant:
    routing = read_routing(section, experts, base)
    own: dict[str, FlagValue] = dict(section.flags("megatron"))
    check_balancing(section, routing, {f"{section.place}.megatron": own})
    if base.method == "switch" != routing.method:  # the mix's capacity is that of its own method
        given = {**given, "moe-expert-capacity-factor": None}
    freeze = section.node.get("freeze", [])
    if not isinstance(freeze, list) or not all(isinstance(word, str) for word in freeze):
        section.refuse("freeze", f"found {freeze!r}, expected a list of groups, as [experts] or ['all-but:router']")
    if "freeze" in section.node and "btx-freeze" in own:
        section.refuse("freeze", "megatron.btx-freeze says it a second time; leave one of them out")
    if "freeze" in section.node:
        own["btx-freeze"] = tuple(freeze) or False  # an empty list takes finetune's back
    if freeze:
        section.reader.flag_sections[f"{section.place}.freeze"] = {"btx-freeze": tuple(freeze)}
    flags = {**given, **routing.flags(given), "num-experts": experts, **own}
    tokens = section.integer("tokens") if "tokens" in section.node else None
    return Variant(name, _seeds(section, seeds), tokens, flags)
