"""Branch-Train-MiX on Megatron-core.

The words of the project. A *seed* model is copied; each copy is trained alone on one *domain* (*branch*, *train*) and
becomes an *expert*; the seed itself may join as the *generalist*. *Mixing* stacks the experts' feed-forward blocks as
the experts of a mixture and averages everything else; *finetuning* then teaches the *router* which token goes where.

From Python (docs/training.md has an example of each):

- ``mix(experts, output)``: experts in, one mixture out.
- ``convert(model)``: one model between Hugging Face and Megatron.
- ``evaluate(models, texts)``: loss per domain, and who is routed where.
- ``load_recipe(file)`` and ``run(recipe)``: a whole pipeline from a YAML file.
- ``InputError``, ``RunError``, ``ChangedStagesError``: what they raise.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_btx.common.errors import InputError as InputError
    from megatron_btx.evaluation.api import evaluate as evaluate
    from megatron_btx.mixing.api import convert as convert
    from megatron_btx.mixing.api import mix as mix
    from megatron_btx.recipe.load import load_recipe as load_recipe
    from megatron_btx.runner.api import run as run
    from megatron_btx.runner.decisions import ChangedStagesError as ChangedStagesError
    from megatron_btx.runner.local import RunError as RunError

__version__ = "0.1.0"
__all__ = ["ChangedStagesError", "InputError", "RunError", "convert", "evaluate", "load_recipe", "mix", "run"]

_HOMES = {
    "ChangedStagesError": "runner.decisions",
    "InputError": "common.errors",
    "RunError": "runner.local",
    "convert": "mixing.api",
    "evaluate": "evaluation.api",
    "load_recipe": "recipe.load",
    "mix": "mixing.api",
    "run": "runner.api",
}
"""Where each of them is: imported when it is asked for, so that a command's --help answers at once."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatron_btx' has no attribute {name!r}")
    return getattr(import_module(f"megatron_btx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
