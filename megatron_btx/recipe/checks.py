"""What only the parts of a recipe together can violate, and what one of them would pass over in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_btx.recipe.errors import refuse
from megatron_btx.recipe.names import GENERALIST
from megatron_btx.recipe.schema import Mix, Recipe

if TYPE_CHECKING:
    from megatron_btx.recipe.sections import EvaluateSection, RecipeSection


def check_whole(recipe: Recipe, written: RecipeSection) -> None:
    """Refuse sections that do not go together. Raises InputError with the place and the remedy."""
    if recipe.finetune and not recipe.mix:
        refuse("finetune", "there is no mix to finetune; add mix: {}")
    if recipe.mix and not recipe.mix.source and not recipe.experts and len(recipe.mix.experts) > 1:
        refuse("mix", "there are no experts to mix; add experts, or mix: {from: PATH}")
    if written.ablation is not None:
        _check_ablation(recipe, written)
    if recipe.export and not recipe.finetune:
        refuse("export", "it is of the finetuned mixture; add finetune")
    if recipe.average:
        _check_average(recipe, recipe.mix)
    if recipe.dense:
        _check_dense(recipe)
    if recipe.evaluate:
        _check_evaluation_sets(recipe, recipe.evaluate)


def _check_ablation(recipe: Recipe, written: RecipeSection) -> None:
    if not recipe.mix or recipe.mix.source or not recipe.finetune:
        refuse("ablation", "its variants are of a mix of the recipe's experts and of finetune; add both")
    for key, why in (
        ("evaluate", "every variant is measured on ablation.split and ablation.tokens"),
        ("baselines", "its report compares the variants alone"),
        ("export", "it has many finetuned mixtures; btx convert-hf export writes any of them"),
    ):
        if written.says(key):
            refuse(key, f"an ablation makes none: {why}; leave it out (of an included recipe by {key}: null)")
    if recipe.finetune.source:
        refuse("finetune.from", "an ablation finetunes every variant itself; leave it out")
    if written.mix is not None and written.mix.router_seed is not None:
        refuse("mix.router-seed", "an ablation draws its routers from ablation.seeds; leave it out")


def _check_average(recipe: Recipe, mix: Mix | None) -> None:
    if not recipe.experts:
        refuse("baselines.average", "there are no experts to average; add experts")
    names = mix.experts if mix else ()
    for name in names:
        if name not in recipe.experts and name != GENERALIST:
            refuse("baselines.average", f"the mix has {name}, which is no expert of the recipe; leave it out")


def _check_dense(recipe: Recipe) -> None:
    if not recipe.experts or not recipe.finetune:
        refuse("baselines.dense", "its data are those of the experts and of finetune; the recipe lacks one")
    parts = {f"experts.{name}": expert for name, expert in recipe.experts.items()}
    parts["finetune"] = recipe.finetune
    for place, part in parts.items():
        if not part.blend or not part.tokens:
            refuse(place, "baselines.dense is derived from its blend and tokens; state both beside from")


def _check_evaluation_sets(recipe: Recipe, evaluate: EvaluateSection) -> None:
    for domain in recipe.domains:
        prefixes = recipe.data.domains[domain].get(evaluate.split, ())
        if len(prefixes) != 1:
            place = f"data.domains.{domain}.{evaluate.split}"
            refuse(place, f"found {len(prefixes)} prefixes, expected one: it is the domain's evaluation set")
