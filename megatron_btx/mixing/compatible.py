"""Whether sources can be mixed: copies of one seed, or different in ways the user has decided about.

What differs, changes no number of the result and is taken from one of them is said, with the owner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint import safetensors
from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS, differences
from megatron_btx.checkpoint.huggingface.config_writing import PASSED_THROUGH
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.loader import EMBEDDING
from megatron_btx.mixing.request import TAKEABLE, TRAINING_ARGUMENTS, Request
from megatron_btx.tokenizers.comparison import (
    check_same_tokenizer,
    check_vocabulary_union,
    differing_readings,
)
from megatron_btx.tokenizers.vocabulary import CONFIG_FILE
from megatron_btx.tokenizers.written_files import object_in, travelling_files

if TYPE_CHECKING:
    from megatron_btx.mixing.loader import Source
    from megatron_btx.mixing.plan import Plan

_REMEDY = "--allow-other-tokenizer"
_UNION = "where one extends the other, --vocab union averages each row over its owners"
_VOCABULARY = {"padded_vocab_size", "vocab_size"}
_NUMBERS = 4096
"""Of each matrix, to see whether models resemble each other."""
_UNRELATED = 0.1
"""A smaller cosine means nothing: that of random numbers is below 0.03 for all but the smallest models."""
_SAID_AS_ARGUMENT = ("initializer_range", "attention_dropout")


def compare_sources(sources: Sequence[Source], request: Request) -> dict[str, Any]:
    """Refuse sources that are not copies of one seed; returns the arguments of their mix.

    Args:
        sources: those that are mixed, and last their base, where there is one.

    Raises:
        InputError: names the difference, both values, and the flag with which it can be accepted.
    """
    first = sources[0]
    taken = {}
    for field, name in request.take.items():
        for argument in TAKEABLE[field]:
            taken[argument] = name
    for other in sources[1:]:
        _check_arguments(first, other, set(taken), request)
        if "dtype" not in request.take:
            _check_dtypes(first, other)
    arguments = dict(first.arguments)
    by_name = {source.name: source.arguments for source in sources}
    table = {argument.name: argument for argument in MODEL_ARGUMENTS}
    for argument, name in taken.items():
        stored = by_name[name]
        if argument in table:
            arguments[argument] = table[argument].value(stored)
        else:
            arguments[argument] = stored.get(argument)
    arguments |= _check_vocabularies(sources, request)
    return arguments


def _check_arguments(first: Source, other: Source, taken: set[str], request: Request) -> None:
    left, right = _normalise_arguments(first.arguments), _normalise_arguments(other.arguments)
    one_kind = bool(first.sizes.experts) == bool(other.sizes.experts)
    found = []
    for argument, x, y in differences(left, right):
        of_experts = argument.moe or argument.name == "num_experts"
        if one_kind or not of_experts:  # what a mixture has beside a dense model is no difference
            found.append((argument.name, x, y))
    scaling, other_scaling = left.get("hf_rope_scaling"), right.get("hf_rope_scaling")
    if scaling != other_scaling:
        found.append(("hf_rope_scaling", scaling, other_scaling))
    found = [(name, x, y) for name, x, y in found if name not in taken | _VOCABULARY]
    if not found:
        return
    listed = "; ".join(f"{name}: {x!r} in {first.name}, {y!r} in {other.name}" for name, x, y in found)
    field_of = {argument: field for field, arguments in TAKEABLE.items() for argument in arguments}
    fields = dict.fromkeys(field_of.get(name) for name, _, _ in found)
    remedy = "all must come from one seed"
    if None not in fields:
        choices = " ".join(f"--take {field}={first.name}" for field in fields)
        remedy += f", or choose a value: {choices} (or ={other.name})"
    raise InputError(f"experts differ in their configuration: {listed}; {remedy}")


def _normalise_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with what means the same made equal: Megatron fills some in where Hugging Face leaves them out."""
    result = dict(arguments)
    if result.get("kv_channels") is None:
        result["kv_channels"] = result["hidden_size"] // result["num_attention_heads"]
    if not result.get("use_rope_scaling"):
        result.pop("rope_scaling_factor", None)
    if result.get("position_embedding_type") == "rope":
        result.pop("add_position_embedding", None)
    if result.get("use_rope_scaling") or result.get("rotary_seq_len_interpolation_factor"):
        result.pop("hf_rope_scaling", None)  # Megatron's own arguments say it all
    result["window_size"] = result.get("window_size")
    if isinstance(result["window_size"], list):
        result["window_size"] = tuple(result["window_size"])
    return result


def _check_dtypes(first: Source, other: Source) -> None:
    """Compare the types of what both have; shapes follow from the configuration, in every source that is open."""
    for name, held in first.pieces.items():
        others = other.pieces.get(name, held)
        if held.dtype != others.dtype:
            raise InputError(
                f"{held.location.key}: {held.dtype} in {first.name}, {others.dtype} in {other.name}; all "
                f"must come from one seed, or choose one: --take dtype={first.name} (or ={other.name})"
            )


def _check_vocabularies(sources: Sequence[Source], request: Request) -> dict[str, Any]:
    """Equal vocabularies, or with ``--vocab union`` ones that extend each other; returns the result's sizes.

    Rows of padding may differ: they belong to no token, and no average counts them.
    """
    chosen = vocabulary_source(sources[: len(request.experts)], request)
    if len(sources) > 1:
        known = all(source.tokenizer.tokens is not None for source in sources)
        if request.vocabulary == "same" and (request.allow_other_tokenizer or not known):
            _check_sizes(sources)
        if not request.allow_other_tokenizer:
            _check_tokenizers(sources, chosen, request)
    wanted = request.take.get("tokenizer", chosen.name)
    if chosen.name != wanted:
        raise InputError(f"--take tokenizer={wanted}: has fewer tokens than {chosen.name}, or none; take {chosen.name}")
    arguments: dict[str, Any] = {}
    for name in ("vocab_size", "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file"):
        arguments[name] = chosen.arguments.get(name)
    arguments["padded_vocab_size"] = max(source.pieces[EMBEDDING].shape[0] for source in sources)
    return arguments


def _check_sizes(sources: Sequence[Source]) -> None:
    """Refuse vocabularies of other sizes by the configuration alone, which may count padding."""
    sizes: dict[str, int] = {}
    for source in sources:
        rows = source.pieces[EMBEDDING].shape[0]
        sizes[source.name] = min(rows, source.arguments.get("vocab_size") or rows)
    smallest = min(sizes, key=sizes.__getitem__)
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[smallest] < sizes[largest]:
        raise InputError(
            f"vocabularies differ: {smallest} has {sizes[smallest]} tokens, {largest} has {sizes[largest]}; {_UNION}"
        )


def _check_tokenizers(sources: Sequence[Source], chosen: Source, request: Request) -> None:
    stored = {source.name: source.tokenizer.arguments for source in sources}
    if request.vocabulary == "union":
        check_vocabulary_union(stored, _REMEDY)
        _check_union(sources, chosen)
    else:
        try:
            check_same_tokenizer(stored, _REMEDY)
        except InputError as error:
            if len({source.token_count for source in sources}) == 1:
                raise
            raise InputError(f"{error}; {_UNION}") from error
    if "tokenizer" in request.take:
        return
    if differing := differing_readings([source.tokenizer for source in sources]):
        what, shown = differing
        listed = ", ".join(f"{value!r} in {name}" for name, value in shown.items())
        choices = ", ".join(f"--take tokenizer={name}" for name in shown)
        raise InputError(
            f"tokenizers differ: {what} is {listed}, and the result can do one of these alone; choose one: {choices}"
        )


def _check_union(sources: Sequence[Source], chosen: Source) -> None:
    every: dict[int, tuple[str, str]] = {}
    for source in sources:
        for number, token in (source.tokenizer.tokens or {}).items():
            every.setdefault(number, (token, source.name))
    if lacking := sorted(every.keys() - (chosen.tokenizer.tokens or {}).keys()):
        token, owner = every[lacking[0]]
        raise InputError(
            f"--vocab union: no expert's tokenizer has every token: that of {chosen.name} has the most and lacks "
            f"{len(lacking)}, the first {token!r} (token {lacking[0]} of {owner}); give one expert a tokenizer that "
            f"has all of them, or {_REMEDY}, which takes that of {chosen.name}"
        )


def vocabulary_source(sources: Sequence[Source], request: Request) -> Source:
    """The source whose tokenizer is the result's: most tokens, then the one asked for, then most rows, then the first.

    One without a tokenizer, whose tokens are its rows, comes last. A tokenizer can have tokens beyond its model's rows;
    beside the rows of a larger model they would seem to have one.
    """
    wanted = request.take.get("tokenizer")

    def rank(source: Source) -> tuple[int, ...]:
        rows = source.pieces[EMBEDDING].shape[0]
        return source.tokenizer.place is not None, source.token_count, source.name == wanted, rows

    return max(sources, key=rank)


# --- what is said ------------------------------------------------------------------------------------------------


def remarks(plan: Plan, stand_ins: Sequence[str] = ()) -> list[str]:
    """One line for each value of sources that differs and nobody has decided about; of stand-ins, no likeness."""
    lines = []
    if len(plan.mixed) > 1 and not any(source.tokenizer.place for source in plan.mixed):
        lines.append("no source has a tokenizer's files: the sizes of the vocabularies alone are compared")
    first = plan.mixed[0].name
    owner = vocabulary_source(plan.mixed, plan.request).name
    for name in TRAINING_ARGUMENTS:
        values = {source.name: source.arguments.get(name) for source in plan.mixed}
        if _differ(values) and name not in plan.request.take:
            lines.append(
                f"{_list_values(name, values)}; the result has that of {first} (--take {name}=NAME for another)"
            )
    configs = {}
    for source in plan.mixed:
        if source.hf_folder is not None:
            configs[source.name] = safetensors.read_json(source.hf_folder / safetensors.CONFIG)
    for key in PASSED_THROUGH:
        values = {name: config[key] for name, config in configs.items() if key in config}
        if key not in _SAID_AS_ARGUMENT and _differ(values):
            lines.append(f"{_list_values(key, values)}; the result has that of {owner}, whose tokenizer it gets")
    # Without the flag this was refused, or somebody has chosen.
    if plan.request.allow_other_tokenizer and (differing := differing_readings([s.tokenizer for s in plan.mixed])):
        lines.append(f"{_list_values(*differing)}; the result has that of {owner}")
    if _differ({source.name: _chat_templates(source) for source in plan.mixed if source.hf_folder}):
        lines.append(f"chat templates differ between sources; the result has those of {owner}")
    return [*lines, *_likeness([source for source in plan.sources if source.name not in stand_ins])]


def _chat_templates(source: Source) -> object:
    files = travelling_files(source.hf_folder or source.root)
    inside = object_in(files.get(CONFIG_FILE, b"")).get("chat_template")
    return inside, {name: content for name, content in files.items() if "chat_template" in name}


def _likeness(sources: Sequence[Source]) -> Iterator[str]:
    """A line for each pair whose weights are the same, or have nothing to do with each other.

    Branches of one seed keep its directions: their matrices have a cosine far from 0, however long they were trained.
    It is 0 for models that began from other random numbers. The first rows of each matrix show it.
    """
    import torch

    if len(sources) < 2:
        return
    rows = {}
    for source in sources:
        found = []
        for name, held in source.pieces.items():
            in_all = all(name in other.pieces for other in sources)
            if in_all and name.startswith("layers.") and len(held.shape) == 2:
                count = min(held.shape[0], max(1, _NUMBERS // held.shape[1]))
                found.append(source.read(name, 0, count).reshape(-1))
        rows[source.name] = torch.cat(found).double()
    for (left, one), (right, other) in itertools.combinations(rows.items(), 2):
        cosine = float(one @ other / (one.norm() * other.norm()))
        if torch.equal(one, other):
            yield f"{left} and {right} have the same first rows in every matrix: is one model given twice?"
        elif abs(cosine) < _UNRELATED:
            yield (
                f"{left} and {right} do not resemble each other: the first rows of their matrices have a cosine of "
                f"{cosine:.3f}, those of one seed's branches are far from 0; of other bases no mean is a model"
            )


def _differ(values: Mapping[str, Any]) -> bool:
    given = [value for value in values.values() if value is not None]
    return any(value != given[0] for value in given)


def _list_values(name: str, values: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{value!r} in {source}" for source, value in values.items())
    return f"{name} differs: {listed}"
