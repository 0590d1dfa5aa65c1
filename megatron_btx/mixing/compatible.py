"""Whether sources can be mixed: copies of one seed, or different in ways the user has decided about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS, differences
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.overrides import TAKEABLE, field_with
from megatron_btx.mixing.request import Request
from megatron_btx.mixing.sources import EMBEDDING
from megatron_btx.tokenizers.comparison import (
    check_same_tokenizer,
    check_vocabulary_union,
    contradictions,
    differing_readings,
)

if TYPE_CHECKING:
    from megatron_btx.mixing.sources import Source

_REMEDY = "--allow-other-tokenizer"
_VOCABULARY = {"padded_vocab_size", "vocab_size"}


def compare_sources(sources: Sequence[Source], request: Request) -> dict[str, Any]:
    """Refuse sources that are not copies of one seed; returns the arguments of their mix.

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
        _check_pieces(first, other, "dtype" in request.take)
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
    found = [(argument.name, x, y) for argument, x, y in differences(left, right)]
    scaling, other_scaling = left.get("hf_rope_scaling"), right.get("hf_rope_scaling")
    if scaling != other_scaling:
        found.append(("hf_rope_scaling", scaling, other_scaling))
    found = [(name, x, y) for name, x, y in found if name not in taken | _VOCABULARY]
    if not found:
        return
    listed = "; ".join(f"{name}: {x!r} in {first.name}, {y!r} in {other.name}" for name, x, y in found)
    fields = dict.fromkeys(field_with(name) for name, _, _ in found)
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


def _check_pieces(first: Source, other: Source, other_dtype: bool) -> None:
    """Compare pieces of equal configurations: both have the same, maybe of other types or with other rows."""
    for name, held in first.pieces.items():
        others = other.pieces[name]
        axis = int(name.startswith(("embedding.", "head.")))
        same_shape = held.shape[axis:] == others.shape[axis:]
        if same_shape and (other_dtype or held.dtype == others.dtype):
            continue
        remedy = ""
        if same_shape:
            remedy = f", or choose one: --take dtype={first.name} (or ={other.name})"
        raise InputError(
            f"{held.location.key}: {list(held.shape)} {held.dtype} in {first.name}, "
            f"{list(others.shape)} {others.dtype} in {other.name}; all must come from one seed{remedy}"
        )


def _check_vocabularies(sources: Sequence[Source], request: Request) -> dict[str, Any]:
    """Equal vocabularies, or with ``--vocab union`` ones that extend each other; returns the result's sizes.

    Rows of padding may differ: they belong to no token, and no average counts them.
    """
    if len(sources) > 1:
        _check_sizes(sources, request)
        if not request.allow_other_tokenizer:
            _check_tokenizers(sources, request)
    chosen = vocabulary_source(sources, request)
    wanted = request.take.get("tokenizer", chosen.name)
    if chosen.name != wanted:
        raise InputError(f"--take tokenizer={wanted}: has fewer tokens than {chosen.name}, or none; take {chosen.name}")
    arguments: dict[str, Any] = {}
    for name in ("vocab_size", "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file"):
        arguments[name] = chosen.arguments.get(name)
    arguments["padded_vocab_size"] = max(source.pieces[EMBEDDING].shape[0] for source in sources)
    return arguments


def _check_sizes(sources: Sequence[Source], request: Request) -> None:
    """Refuse vocabularies of which one has tokens that another has not, unless a union is asked for.

    Tokenizers that are missing, or not to be compared, say nothing: then the configurations' sizes count.
    """
    tables = {source.name: source.tokens for source in sources}
    known = {name: table for name, table in tables.items() if table is not None}
    compares = len(known) == len(tables) and not request.allow_other_tokenizer
    if request.vocabulary_union or (compares and contradictions(known)):
        return  # what is wrong is said where tokenizers are compared
    if compares:
        sizes = {name: len(table) for name, table in known.items()}
        missing = _describe_missing_token(known)
    else:
        sizes = {source.name: _configured_size(source) for source in sources}
        missing = ""
    if len(set(sizes.values())) > 1 or missing:
        smallest = min(sizes, key=sizes.__getitem__)
        largest = max(sizes, key=sizes.__getitem__)
        raise InputError(
            f"vocabularies differ: {smallest} has {sizes[smallest]} tokens, {largest} has {sizes[largest]}{missing}; "
            "where one extends the other, --vocab union averages each row over its owners"
        )


def _configured_size(source: Source) -> int:
    """Tokens by the configuration alone, which may count padding."""
    rows = source.pieces[EMBEDDING].shape[0]
    return min(rows, source.arguments.get("vocab_size") or rows)


def _describe_missing_token(tables: Mapping[str, Mapping[int, str]]) -> str:
    """In words, the first token that one model has and another has not; "" where there is none."""
    every = _all_tokens(tables)
    for number in sorted(every):
        for name, table in tables.items():
            if number not in table:
                token, owner = every[number]
                return f" (token {number} is {token!r} in {owner} and nobody's in {name})"
    return ""


def _all_tokens(tables: Mapping[str, Mapping[int, str]]) -> dict[int, tuple[str, str]]:
    """The tokens of all, each with the first that has it."""
    every: dict[int, tuple[str, str]] = {}
    for name, table in tables.items():
        for number, token in table.items():
            every.setdefault(number, (token, name))
    return every


def _check_tokenizers(sources: Sequence[Source], request: Request) -> None:
    stored = {source.name: source.tokenizer_arguments for source in sources}
    if request.vocabulary_union:
        check_vocabulary_union(stored, _REMEDY)
        _check_union(sources, request)
    else:
        check_same_tokenizer(stored, _REMEDY)
    if "tokenizer" in request.take:
        return
    differing = differing_readings([source.tokenizer for source in sources])
    if differing:
        what, shown = differing
        listed = ", ".join(f"{value!r} in {name}" for name, value in shown.items())
        choices = ", ".join(f"--take tokenizer={name}" for name in shown)
        raise InputError(
            f"tokenizers differ: {what} is {listed}, and the result can do one of these alone; choose one: {choices}"
        )


def _check_union(sources: Sequence[Source], request: Request) -> None:
    """Refuse a union in which no tokenizer has every token."""
    tables = {source.name: source.tokens or {} for source in sources}
    chosen = vocabulary_source(sources, request)
    every = _all_tokens(tables)
    lacking = [number for number in sorted(every) if number not in tables[chosen.name]]
    if lacking:
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
    return max(sources, key=lambda s: (s.has_tokenizer, s.token_count, s.name == wanted, s.pieces[EMBEDDING].shape[0]))
