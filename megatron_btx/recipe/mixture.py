"""The model that a mix makes: what a recipe's keys of the converter make other than in the dense models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_btx.common.errors import InputError
from megatron_btx.common.refusals import refuse
from megatron_btx.mixing import cli
from megatron_btx.mixing.methods import METHODS, Given, Model
from megatron_btx.mixing.options import DIFFERENCES, MIXTURE
from megatron_btx.mixing.request import MULTIPLE_AT_MOST
from megatron_btx.recipe.budgets import model_shape
from megatron_btx.recipe.flags import Flags, FlagValue
from megatron_btx.recipe.names import MIX_STAGE
from megatron_btx.recipe.options import ROWS, option_words, pad_rows, say_keys, words_of

if TYPE_CHECKING:
    from megatron_btx.recipe.sections import MixSection

_LAYERS = "moe-layer-freq"


def mixture_shape(
    section: MixSection, names: Sequence[str], model: Flags, base: int | None, rows: Sequence[int | None]
) -> dict[str, FlagValue]:
    """The flags by which the mixture is not the dense model: its experts, their width, its layers and rows.

    Args:
        base: rows of the dense model's embedding.
        rows: of each source's; None for one that the run trains.

    Raises:
        InputError: the place in the recipe, and what the converter would refuse.
    """
    words = option_words(section)
    asked = cli.parser().parse_args([*(f"--expert={name}=." for name in names), *words])
    method = METHODS[asked.method]
    if method.has_base:
        asked.base = "."
    if len(names) < method.at_least or len(set(names)) < len(names):
        refuse("mix.experts", f"found {list(names)!r}, expected at least two different experts")
    if section.from_ is not None:
        if words_of(words, DIFFERENCES, MIXTURE):
            refuse(
                "mix.from",
                f"found beside {' '.join(words).replace('--', '')}, for a mix that the run makes; leave it out",
            )
        return {"num-experts": len(names)}
    if _LAYERS in section.megatron:
        refuse(f"mix.megatron.{_LAYERS}", f"the mix has to know it, too; write it as mix.{_LAYERS}")
    if method.experts is None:
        makes = [name for name, row in METHODS.items() if row.experts is not None]
        refuse("mix.method", f"found {asked.method}, expected one that makes a mixture: {', '.join(makes)}")
    try:
        request = cli.request_of(asked)
    except InputError as error:
        raise InputError(say_keys(str(error), MIX_STAGE)) from None
    experts = method.experts(Given(request.own, tuple(Model(name) for name in names)))
    shape: dict[str, FlagValue] = {"num-experts": len(experts.names)}
    if experts.chunks != experts.cut:
        shape["moe-ffn-hidden-size"] = model_shape(model, 1).ffn // experts.cut * experts.chunks
    if request.layer_frequency != 1:
        shape[_LAYERS] = str(request.layer_frequency).replace(" ", "").replace("(", "[").replace(")", "]")
    known = [base if found is None else found for found in rows]
    most = pad_rows(max(found or 0 for found in known), words)
    if base is not None and most != base:
        shape[ROWS] = most
    return shape


def equal_rows(rows: Sequence[int]) -> str:
    """What makes models of these numbers of rows equal; 128 suits every tensor parallel size up to it."""
    for multiple in range(128, MULTIPLE_AT_MOST + 1, 128):
        padded = {-(-found // multiple) * multiple for found in rows}
        if len(padded) == 1:
            return f"give each of them pad-vocab-to-multiple-of: {multiple}, which makes it {padded.pop()}"
    return f"no pad-vocab-to-multiple-of up to {MULTIPLE_AT_MOST} makes them equal; leave evaluate out"
