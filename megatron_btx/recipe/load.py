"""From a YAML file to a recipe: what is written is validated section by section, then expanded into models.

Everything unknown is refused, with the place, the close match and what is known there: a setting that is silently
ignored costs a training run. Relative paths count from the directory in which the command is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_btx.common.errors import InputError
from megatron_btx.common.refusals import describe
from megatron_btx.recipe.data import choose_domains, read_data
from megatron_btx.recipe.expand import Expansion, recipe_section
from megatron_btx.recipe.flags import Flags, number
from megatron_btx.recipe.from_checkpoint import GivenModel, is_loadable, read_models
from megatron_btx.recipe.options import ROWS, option_words, pad_rows
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.section import Section
from megatron_btx.recipe.sections import LayoutSection, MixSection, RecipeSection, TrainingSection, VariantSection
from megatron_btx.recipe.yaml import check_keys, load_tree

_FLAG_SECTIONS = ("tokenizer", "model", "training", "megatron")


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file ``path`` with ``changes`` applied, each a dotted KEY=VALUE, as ``seed.tokens=1000``.

    Raises:
        InputError: the file, the place in it, what was found, what was expected.
    """
    return parse_recipe(load_tree(Path(path), changes), str(path))


def parse_recipe(tree: Mapping[str, Any], file: str) -> Recipe:
    """Check ``tree`` and make a Recipe of it. Raises InputError with the place, what was found, what was expected."""
    form = recipe_section()
    try:
        check_keys(tree)
        named = {**tree, "name": Path(file).stem} if tree.get("name") is None else tree
        return _make_recipe(form.model_validate(named), file, tree)
    except ValidationError as error:
        raise InputError(f"{file}: {describe(error, form)}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _make_recipe(written: RecipeSection, file: str, tree: Mapping[str, Any]) -> Recipe:
    given = _read_given(written)
    data = read_data(written.data, given["seed"].tokenizer if "seed" in given else {})
    recipe = Recipe(
        file=file,
        name=written.name,
        sections=written,
        data=data,
        domains=choose_domains(written.domains, tuple(data.domains)),
        model=_dense_flags(written, given),
        tree=tree,
        flag_sections=list_flag_sections(written),
    )
    return Expansion(recipe, given).expand()


def _read_given(written: RecipeSection) -> Mapping[str, GivenModel]:
    """What the given models say of themselves, the seed first; empty where nobody needs to know.

    That is where the recipe states the model and the tokenizer itself, and Megatron can start from all of them.
    """
    stages: dict[str, TrainingSection | MixSection | None] = {"seed": written.seed}
    stages |= {f"experts.{name}": expert for name, expert in written.experts.items()}
    stages |= {"mix": written.mix, "finetune": written.finetune}
    paths = {}
    for place, section in stages.items():
        if section is not None and section.from_ is not None:
            paths[place] = section.from_
    needs_tokenizer = "tokenizer-type" not in written.data.tokenizer and "seed" in paths
    needs_model = "num-layers" not in written.model
    loadable = all(is_loadable(path) for path in paths.values())
    if not paths or (loadable and not needs_model and not needs_tokenizer):
        return {}
    return read_models(paths)


def _dense_flags(written: RecipeSection, given: Mapping[str, GivenModel]) -> Flags:
    """The dense model's flags: what the seed says, else the first expert, and what the recipe says."""
    for place, model in given.items():
        if place == "seed" or place.startswith("experts."):
            section = written.seed if place == "seed" else written.experts[place.removeprefix("experts.")]
            rows = {ROWS: str(pad_rows(number(model.model, ROWS), option_words(section)))}
            return {**model.model, **rows, **written.model}
    return written.model


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
        sections[f"{place}freeze"] = written.freeze_flags()
    return {where: flags for where, flags in sections.items() if flags}
