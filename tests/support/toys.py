"""Somebody else's package: a method of mixing, a baseline and a claim of their own; docs/design.md says how they join.

The method is a TIES without its signs: of each expert's difference from the base the largest share is kept, tensor by
tensor; feed-forward blocks trimmed become experts, the rest is the base and the mean of the trimmed differences. Torch
is imported where numbers are: recipes and reports read the row without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from megatron_btx.mixing.methods import Chunk, Experts, Method, dense_name, new_router
from megatron_btx.mixing.operations import Operation, stream
from megatron_btx.mixing.options import Option
from megatron_btx.recipe.expand import Baseline, Expansion
from megatron_btx.recipe.models import Mix, ModelSpec
from megatron_btx.recipe.section import Section
from megatron_btx.report.claims import Claim, Pair, Verdict, every_lower
from megatron_btx.report.models import Cast


class Trim(Operation):
    """The base, and the mean of the largest differences from it."""

    name = "trim"

    def prepare(self, plan, planned):
        """Of each expert's whole tensor, the smallest difference that is kept."""
        import torch

        *experts, base = planned.parts
        thresholds = []
        for part in experts:
            pairs = zip(stream(plan, part), stream(plan, base), strict=True)
            sizes = torch.cat([(mine.double() - its.double()).abs().flatten() for mine, its in pairs])
            kept = max(1, math.ceil(plan.request.own["density"] * len(sizes)))
            thresholds.append(float(sizes.topk(kept).values[-1]))
        return thresholds

    def rows(self, plan, planned, start, stop):
        """A stretch of rows, with the thresholds of the whole."""
        import torch

        *experts, base = planned.parts
        thresholds = plan.prepared(planned)
        its = plan.read(base, start, stop).double()
        total = torch.zeros_like(its)
        for part, threshold in zip(experts, thresholds, strict=True):
            change = plan.read(part, start, stop).double() - its
            total += torch.where(change.abs() >= threshold, change, 0.0)
        return (its + total / len(experts)).to(planned.dtype)

    def describe(self, plan, planned):
        """With the option's value."""
        return f"largest {plan.request.own['density']:g} of the differences from the base"

    def reference(self, plan, planned, rows, numbers):
        """By sorting whole tensors."""
        import torch

        *experts, base = planned.parts
        result = numbers[base].clone()
        for part in experts:
            mine, its = (torch.cat(list(stream(plan, p))).double() for p in (part, base))
            ordered = (mine - its).abs().flatten().sort(descending=True).values
            least = ordered[max(1, math.ceil(plan.request.own["density"] * len(ordered))) - 1]
            change = numbers[part] - numbers[base]
            result += change * (change.abs() >= least) / len(experts)
        return result


TRIM = Trim()


def make(given, piece):
    """Every expert trimmed; the rest trimmed and averaged."""
    if "expert" in piece.numbers:
        name = dense_name(piece)
        return TRIM, (Chunk(piece.numbers["expert"], name), Chunk(given.base, name))
    if ".router." in piece.name:
        return new_router(piece)
    return TRIM, tuple(Chunk(source, piece.name) for source in range(len(given.models) + 1))


def trim() -> Method:
    """Its row."""
    density = Option(
        "density",
        "share of the differences that is kept",
        float,
        0.2,
        metavar="D",
        expect=lambda share: "" if 0 < share <= 1 else "a share above 0, at most 1",
    )
    return Method(
        "experts and mean of trimmed differences from a base",
        make,
        lambda given: Experts(tuple(model.name for model in given.models)),
        has_base=True,
        own_options=(density,),
    )


class DenserSection(Section):
    """The key ``baselines.denser`` of a recipe."""

    density: float = 1.0


def denser(expansion: Expansion, section: DenserSection) -> Iterable[ModelSpec]:
    """The same mix with more of the differences."""
    mix = expansion.rows["mix"]
    assert isinstance(mix.make, Mix)
    words = [word for word in mix.make.words if not word.startswith("--density")]
    make = Mix(mix.make.sources, (*words, f"--density={section.density}"))
    meaning = "the mixture with more of the differences"
    yield ModelSpec("denser", "denser", make, "denser", meaning, flags=mix.flags, evaluated_in=mix.evaluated_in)


def less_is_more(cast: Cast) -> Verdict:
    """The denser mix against the recipe's."""
    mix, other = cast.need("mix", "denser")
    losses = other.values("loss")
    pairs = {domain: Pair(losses.get(domain), loss) for domain, loss in mix.values("loss").items()}
    return every_lower(pairs, "denser_mix")


def register() -> None:
    """What the package does when it is imported as a plugin."""
    from megatron_btx.mixing.methods import METHODS
    from megatron_btx.recipe.expand import BASELINES
    from megatron_btx.report.claims import CLAIMS

    METHODS["trim"] = trim()
    BASELINES["denser"] = Baseline(DenserSection, denser)
    CLAIMS.append(Claim("less_is_more", "Fewer differences are better.", less_is_more))


def install(folder: Path) -> None:
    """Make it an installed package for whoever has ``folder`` on PYTHONPATH."""
    package = folder / "btx_toys-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: btx-toys\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[megatron_btx]\ntoys = btx_toys\n")
    (folder / "btx_toys.py").write_text("from tests.support.toys import register\n\nregister()\n")
