"""Tokenizers compared by what they are: two models may be mixed only when a token means the same in both.

First their tables, then the rules by which they cut texts, as their files say them. What the files do not say is asked
of transformers (:func:`differing_readings`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import hash_file
from megatron_btx.tokenizers.rules import first_difference, read_rules
from megatron_btx.tokenizers.texts import texts
from megatron_btx.tokenizers.verify import encode_with_transformers, ids_around, load_with_transformers
from megatron_btx.tokenizers.vocabulary import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    ModelTokenizer,
    UnknownVocabularyError,
    known_vocabulary,
    read_object,
    refuse_pointer,
    tokenizer_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stored = Mapping[str, Any]
_SHOWN, _TEXT_SHOWN = 3, 60
_NO_IDS = ("chat_template", "model_max_length", "padding_side", "truncation_side", "name_or_path", "processor_class")
"""Settings of a tokenizer_config.json that decide no id of a text."""
_ALL = 1 << 62
_ONE = "models can only be mixed or continued with one tokenizer"


class _Compared(ModelTokenizer):
    """A tokenizer with what is compared of it, each part read once and when it is asked for."""

    @functools.cached_property
    def rules(self) -> Mapping[str, Any]:
        """How it cuts texts, as far as its files tell."""
        return read_rules(self.vocabulary, self.arguments.get("merge_file"))

    @functools.cached_property
    def files(self) -> list[Path]:
        """Its files; none where one of them is gone."""
        if self.place is None:
            return []
        if self.place.is_dir():
            return tokenizer_files(self.place)
        given = map(self.arguments.get, TOKENIZER_FILES)
        named = [Path(file) for file in given if file is not None]
        if all(map(Path.is_file, named)):
            return named
        return []

    @functools.cached_property
    def identity(self) -> tuple[object, ...]:
        """What tells two tokenizers apart unread: kind and bytes; the size where there is nothing to read."""
        kind = self.arguments.get("tokenizer_type")
        if self.place is None:  # a folder without a tokenizer says no kind, and Megatron's form of it says "none"
            return kind or "NullTokenizer", self.arguments.get("vocab_size")
        if not self.files:
            return kind, object()  # equal to nothing: what is gone is unknown
        if self.place.is_dir():
            kind = "HuggingFaceTokenizer"
        return kind, tuple(map(hash_file, self.files))


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
    for one, other in itertools.combinations(itertools.starmap(_Compared, sources.items()), 2):
        _check_pair(one, other, remedy)


def _check_pair(one: _Compared, other: _Compared, remedy: str) -> None:
    same_files = one.identity == other.identity
    if same_files:  # two equal pointers say nothing of what they point to
        try:
            for file in one.files:
                refuse_pointer(file)
        except UnknownVocabularyError as error:
            raise InputError(f"{one.model}: {error} (or {remedy})") from error
        if one.rows == other.rows:
            return
    elif one.place is None and other.place is None:
        raise InputError(
            f"tokenizers differ: {_kind_and_size(one)} and {_kind_and_size(other)}; {_ONE} "
            f"({remedy} if you know better)"
        )
    try:
        left = one.vocabulary.below(one.rows or other.rows or _ALL)
        right = other.vocabulary.below(other.rows or one.rows or _ALL)
    except UnknownVocabularyError:
        if same_files:
            return
        raise _unknown(one, other, remedy) from None
    different = [number for number in sorted({*left, *right}) if left.get(number) != right.get(number)]
    if different:
        shown = []
        for number in different[:_SHOWN]:
            tokens = [repr(table[number]) if number in table else "nobody's" for table in (left, right)]
            shown.append(f"token {number} is {tokens[0]} in {one.model} and {tokens[1]} in {other.model}")
        raise InputError(
            f"tokenizers differ: {', '.join(shown)}; {_count(different)}; {_ONE} ({remedy} if you know better)"
        )
    _refuse_other_rules(one, other, None, remedy)


def _refuse_other_rules(one: _Compared, other: _Compared, among: Mapping[int, str] | None, remedy: str) -> None:
    difference = first_difference(one.rules, other.rules, among)
    if difference:
        have = "have the same tokens"
        if among is not None:
            have = f"have {len(among)} tokens in common"
        raise InputError(
            f"tokenizers differ: {one.model} and {other.model} {have} and cut texts in other ways, because of "
            f"{difference}; {_ONE} ({remedy} if you know that the ids are the same)"
        )


def _count(different: Sized) -> str:
    return "1 number differs" if len(different) == 1 else f"{len(different)} numbers differ"


def _kind_and_size(source: _Compared) -> str:
    return f"{source.arguments.get('tokenizer_type')} of {source.arguments.get('vocab_size')} in {source.model}"


def _unknown(one: _Compared, other: _Compared, remedy: str) -> InputError:
    reasons = []
    for source in (one, other):
        try:
            known_vocabulary(source.arguments)
        except UnknownVocabularyError as error:
            reasons.append(f"{source.model}: {error}")
    found = f"of {one.model} and {other.model}"
    if one.files and other.files:
        found = "differ in kind or files, and their tokens"
    return InputError(
        f"tokenizers {found} cannot be compared: {'; '.join(reasons)}; put the tokenizer's files back or beside the "
        f"model, or {remedy} if you know that they are the same"
    )


def check_vocabulary_union(sources: Mapping[str, Stored], remedy: str) -> None:
    """Refuse vocabularies that contradict each other: a token that two of them know must have one number.

    Texts of the tokens that two of them have must be cut alike, too.
    """
    compared = list(itertools.starmap(_Compared, sources.items()))
    tables = {}
    for source in compared:
        try:
            tables[source.model] = source.vocabulary.below(source.rows or _ALL)
        except UnknownVocabularyError as error:
            raise InputError(
                f"{source.model}: its vocabulary cannot be read ({error}), so it cannot be compared; put the "
                f"tokenizer's files beside the model, or {remedy}"
            ) from error
    wrong = contradictions(tables)
    if wrong:
        shown = ", ".join(wrong[number] for number in sorted(wrong)[:_SHOWN])
        raise InputError(
            f"vocabularies do not extend each other: {shown}; {_count(wrong)}; such models cannot be mixed "
            f"({remedy} if you know better)"
        )
    for one, other in itertools.combinations(compared, 2):
        if one.identity != other.identity:
            common = dict(tables[one.model].items() & tables[other.model].items())
            _refuse_other_rules(one, other, common, remedy)


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


# --- what the files do not say -----------------------------------------------------------------------------------


def differing_readings(tokenizers: Sequence[ModelTokenizer]) -> tuple[str, dict[str, str]] | None:
    """In what the tokenizers of models differ, in words, with what each does; None where all do the same.

    A template says it, a setting, a flag of a token, or a class by itself: where their files differ, transformers is
    asked, for what it puts around a text and for the ids of some hundred texts.
    """
    folders: dict[ModelTokenizer, Path] = {}
    for tokenizer in tokenizers:
        folder = tokenizer.arguments["hf_folder"]
        if folder is not None and tokenizer_files(folder):
            folders[tokenizer] = folder
    said = list(map(_settings, folders.values()))
    loaded: dict[ModelTokenizer, PreTrainedTokenizerBase] = {}
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


def _first_text(loaded: Mapping[ModelTokenizer, PreTrainedTokenizerBase]) -> tuple[str, dict[str, str]] | None:
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
            with contextlib.suppress(InputError):
                ids[tokenizer.model] = encode_with_transformers(read)([text], False)[0]
        if len(set(map(tuple, ids.values()))) > 1 and all(map(common.issuperset, ids.values())):
            shown = {name: str(found)[:_TEXT_SHOWN] for name, found in ids.items()}
            return f"the ids of the text {text[:_TEXT_SHOWN]!r}", shown
    return None


def _show_around(loaded: PreTrainedTokenizerBase, config: Mapping[str, object]) -> str:
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
