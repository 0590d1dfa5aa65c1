"""Tokenizers compared by what they are: two models may be mixed only when a token means the same in both.

First their tables, then the rules by which they cut texts, as their files say them. What the files do not say is asked
of transformers (:func:`differing_readings`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.tokenizers.rules import first_difference
from megatron_btx.tokenizers.texts import texts
from megatron_btx.tokenizers.verify import LoadedTokenizer, ids_around, load_with_transformers
from megatron_btx.tokenizers.vocabulary import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    ModelTokenizer,
    UnknownVocabularyError,
    Vocabulary,
    known_vocabulary,
    read_object,
    refuse_pointer,
    tokenizer_files,
    tokenizer_place,
    unknown_reason,
)

Stored = Mapping[str, Any]
_SHOWN, _TEXT_SHOWN = 3, 60
_NO_IDS = ("chat_template", "model_max_length", "padding_side", "truncation_side", "name_or_path", "processor_class")
"""Settings of a tokenizer_config.json that decide no id of a text."""
_ALL = 1 << 62


def check_same_tokenizer(sources: Mapping[str, Stored], remedy: str) -> None:
    """Refuse models whose tokenizers differ: in their tables and rules, never in the paths or form of their files.

    Tokens beyond a model's rows (``padded_vocab_size``) are none of it. Where a table cannot be known, the bytes of the
    files decide.

    Args:
        sources: a name to show, and the stored arguments; ``hf_folder`` among them is a Hugging Face folder.
        remedy: the flag that allows what is refused here.

    Raises:
        InputError: names the first tokens that differ, or why two tokenizers cannot be compared.
    """
    # Every pair: where the first tells no merges, the others are not to be told from it, and may differ all the same.
    for left, right in itertools.combinations(sources, 2):
        _check_pair({left: sources[left], right: sources[right]}, remedy)


def _check_pair(pair: Mapping[str, Stored], remedy: str) -> None:
    (left, one), (right, other) = pair.items()
    same_files = _identity(one) == _identity(other)
    if same_files:
        _refuse_pointers(pair, remedy)
    if same_files and one.get("padded_vocab_size") == other.get("padded_vocab_size"):
        return
    if not same_files and tokenizer_place(one) is None and tokenizer_place(other) is None:
        kinds = [f"{s.get('tokenizer_type')} of {s.get('vocab_size')} in {name}" for name, s in pair.items()]
        raise InputError(
            f"tokenizers differ: {' and '.join(kinds)}; models can only be mixed or continued with one "
            f"tokenizer ({remedy} if you know better)"
        )
    try:
        tables = {left: known_vocabulary(one), right: known_vocabulary(other)}
    except UnknownVocabularyError:
        if same_files:
            return
        raise InputError(_why_unknown(pair, remedy)) from None
    one_rows, other_rows = one.get("padded_vocab_size"), other.get("padded_vocab_size")
    below = {
        left: tables[left].below(one_rows or other_rows or _ALL),
        right: tables[right].below(other_rows or one_rows or _ALL),
    }
    refuse_different_tokens(below, remedy)
    _refuse_other_rules(pair, tables, None, remedy)


def _refuse_other_rules(
    pair: Mapping[str, Stored], tables: Mapping[str, Vocabulary], among: Mapping[int, str] | None, remedy: str
) -> None:
    (left, one), (right, other) = pair.items()
    merges = one.get("merge_file"), other.get("merge_file")
    difference = first_difference(tables[left], tables[right], merges, among)
    if difference:
        have = "have the same tokens"
        if among is not None:
            have = f"have {len(among)} tokens in common"
        raise InputError(
            f"tokenizers differ: {left} and {right} {have} and cut texts in other ways, because of "
            f"{difference}; models can only be mixed or continued with one tokenizer ({remedy} if you know that the "
            "ids are the same)"
        )


def refuse_different_tokens(tables: Mapping[str, Mapping[int, str]], remedy: str) -> None:
    """Refuse two tables that are not equal; see :func:`check_same_tokenizer`.

    Raises:
        InputError: names the first numbers that differ, with both tokens, and how many there are.
    """
    (left, one), (right, other) = tables.items()
    different = [number for number in sorted({*one, *other}) if one.get(number) != other.get(number)]
    if different:
        shown = []
        for number in different[:_SHOWN]:
            shown.append(f"token {number} is {_show(one, number)} in {left} and {_show(other, number)} in {right}")
        raise InputError(
            f"tokenizers differ: {', '.join(shown)}; {_count(different)}; models can only be mixed or continued with "
            f"one tokenizer ({remedy} if you know better)"
        )


def _show(table: Mapping[int, str], number: int) -> str:
    if number in table:
        return repr(table[number])
    return "nobody's"


def _count(different: Sized) -> str:
    if len(different) == 1:
        return "1 number differs"
    return f"{len(different)} numbers differ"


def check_vocabulary_union(sources: Mapping[str, Stored], remedy: str) -> None:
    """Refuse vocabularies that contradict each other: a token that two of them know must have one number.

    Texts of the tokens that two of them have must be cut alike, too.

    Raises:
        InputError: names a token with two numbers, a number with two tokens, a rule that differs, or a vocabulary
            that cannot be read.
    """
    whole, tables = {}, {}
    for name, stored in sources.items():
        try:
            whole[name] = known_vocabulary(stored)
        except UnknownVocabularyError as error:
            raise InputError(
                f"{name}: its vocabulary cannot be read ({error}), so it cannot be compared; put the tokenizer's files "
                f"beside the model, or {remedy}"
            ) from error
        tables[name] = whole[name].below(stored.get("padded_vocab_size") or _ALL)
    refuse_contradictions(tables, remedy)
    for left, right in itertools.combinations(sources, 2):
        pair = {left: sources[left], right: sources[right]}
        if _identity(sources[left]) != _identity(sources[right]):
            common = dict(tables[left].items() & tables[right].items())
            _refuse_other_rules(pair, whole, common, remedy)


def refuse_contradictions(tables: Mapping[str, Mapping[int, str]], remedy: str) -> None:
    """Refuse tables that contradict each other; see :func:`contradictions`.

    Raises:
        InputError: names the first, with both, and how many numbers differ.
    """
    wrong = contradictions(tables)
    if wrong:
        shown = ", ".join(wrong[number] for number in sorted(wrong)[:_SHOWN])
        raise InputError(
            f"vocabularies do not extend each other: {shown}; {_count(wrong)}; such models cannot be mixed "
            f"({remedy} if you know better)"
        )


def contradictions(tables: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """The numbers that have two tokens, or whose token has two numbers, in words; one that one alone has is fine."""
    numbers: dict[int, tuple[str, str]] = {}
    tokens: dict[str, tuple[int, str]] = {}
    wrong: dict[int, str] = {}
    for name, table in tables.items():
        for number, token in table.items():
            before, owner = numbers.setdefault(number, (token, name))
            if before != token:
                wrong.setdefault(number, f"token {number} is {before!r} in {owner} and {token!r} in {name}")
            place, owner = tokens.setdefault(token, (number, name))
            if place != number:
                wrong.setdefault(number, f"{token!r} is token {place} in {owner} and token {number} in {name}")
    return wrong


# --- tokenizers whose table is not known ----------------------------------------------------------------------


def _identity(stored: Stored) -> tuple[object, ...]:
    """What tells two tokenizers apart without reading them: kind and bytes; the size where there is nothing to read."""
    place, kind = tokenizer_place(stored), stored.get("tokenizer_type")
    if place is None:  # a folder without a tokenizer says no kind, and Megatron's form of it says "none"
        return kind or "NullTokenizer", stored.get("vocab_size")
    files = _files(stored)
    if not files:
        return kind, object()  # equal to nothing: what is gone is unknown
    if place.is_dir():
        kind = "HuggingFaceTokenizer"
    return kind, _hash(files)


def _files(stored: Stored) -> list[Path]:
    """The files of a tokenizer; none where one of them is gone."""
    place = tokenizer_place(stored)
    if place is None:
        return []
    if place.is_dir():
        return tokenizer_files(place)
    named = [Path(stored[argument]) for argument in TOKENIZER_FILES if stored.get(argument) is not None]
    if all(map(Path.is_file, named)):
        return named
    return []


def _hash(files: Sequence[Path]) -> str:
    """One hash of the contents of all files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _why_unknown(pair: Mapping[str, Stored], remedy: str) -> str:
    reasons = []
    for name, stored in pair.items():
        reason = unknown_reason(stored)
        if reason:
            reasons.append(f"{name}: {reason}")
    found = "of " + " and ".join(pair)
    if all(map(_files, pair.values())):
        found = "differ in kind or files, and their tokens"
    return (
        f"tokenizers {found} cannot be compared: {'; '.join(reasons)}; put the tokenizer's files back or beside the "
        f"model, or {remedy} if you know that they are the same"
    )


def _refuse_pointers(pair: Mapping[str, Stored], remedy: str) -> None:
    """Two equal pointers say nothing of what they point to."""
    name, stored = next(iter(pair.items()))
    try:
        for file in _files(stored):
            refuse_pointer(file)
    except UnknownVocabularyError as error:
        raise InputError(f"{name}: {error} (or {remedy})") from error


# --- what the files do not say -----------------------------------------------------------------------------------


def differing_readings(tokenizers: Sequence[ModelTokenizer]) -> tuple[str, dict[str, str]] | None:
    """In what the tokenizers of models differ, in words, with what each does; None where all do the same.

    A template says it, a setting, a flag of a token, or a class by itself: where their files differ, transformers is
    asked, for what it puts around a text and for the ids of some hundred texts.
    """
    folders = {t: t.folder for t in tokenizers if t.folder is not None and tokenizer_files(t.folder)}
    said = list(map(_settings, folders.values()))
    loaded: dict[ModelTokenizer, LoadedTokenizer] = {}
    around: dict[str, str] = {}
    for tokenizer, folder in folders.items():
        with contextlib.suppress(InputError):  # said by whoever needs the tokenizer
            if any(settings != said[0] for settings in said):
                read = load_with_transformers(folder)
                around[tokenizer.model] = _show_around(read, read_object(folder / CONFIG_FILE))
                loaded[tokenizer] = read
    if len(set(around.values())) > 1:
        return "what they put around a text", around
    if len(loaded) > 1:
        return _first_text(loaded)
    return None


def _first_text(loaded: Mapping[ModelTokenizer, LoadedTokenizer]) -> tuple[str, dict[str, str]] | None:
    """The first text that some cut into other tokens, though all have each of these tokens."""
    marked: dict[str, None] = {}
    tables = []
    for tokenizer, read in loaded.items():
        marked |= dict.fromkeys([*read.all_special_tokens, *read.get_added_vocab()])
        tables.append(set(tokenizer.tokens or read.get_vocab().values()))
    common = set.intersection(*tables)
    for text in texts([*marked, *map(str.swapcase, marked)], at_most=2 * len(marked)):
        ids = {}
        for tokenizer, read in loaded.items():
            with contextlib.suppress(InputError), bare_exceptions_as(lambda error: InputError(str(error))):
                ids[tokenizer.model] = list(read(text, add_special_tokens=False)["input_ids"])
        if len(set(map(tuple, ids.values()))) > 1 and all(map(common.issuperset, ids.values())):
            shown = {name: str(found)[:_TEXT_SHOWN] for name, found in ids.items()}
            return f"the ids of the text {text[:_TEXT_SHOWN]!r}", shown
    return None


def _show_around(loaded: LoadedTokenizer, config: Mapping[str, object]) -> str:
    """What stands around a text, and a setting that says otherwise: llama.cpp goes by it, transformers may not."""
    tokens = {number: token for token, number in loaded.get_vocab().items()}
    before, after = ids_around(loaded)
    shown = [*map(tokens.__getitem__, before), "TEXT", *map(tokens.__getitem__, after)]
    for setting, ids in (("add_bos_token", before), ("add_eos_token", after)):
        if bool(config.get(setting, ids)) != bool(ids):
            shown.append(f"({setting} is {config[setting]})")
    return " ".join(shown)


def _settings(folder: Path) -> object:
    """Whatever in a folder's files can decide it."""
    files = {file.name: file.read_bytes() for file in tokenizer_files(folder) if file.name != CONFIG_FILE}
    try:
        config, model = read_object(folder / CONFIG_FILE), read_object(folder / "config.json")
    except UnknownVocabularyError:
        return folder
    for name in _NO_IDS:
        config.pop(name, None)
    return files, config, model.get("model_type")
