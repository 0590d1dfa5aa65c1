"""Which tokenizer a result has: the source's own in a form that every reader understands alike, proved before writing.

Folders and checkpoints name tokenizers in many forms, and a form that is carried as it is can mean other ids to another
version of transformers. So the result gets a ``tokenizer.json`` and a class that only reads it. Where the source has
both, they are carried; else they are made: from the SentencePiece model, from GPT-2's two files, or from what the
installed transformers makes of the folder. Either way some hundred texts must get the ids that the source's own gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.tokenizers import sentencepiece as sentencepiece_tokenizer
from megatron_btx.tokenizers import written_files
from megatron_btx.tokenizers.texts import texts
from megatron_btx.tokenizers.verify import (
    Difference,
    Ids,
    Reference,
    compare,
    encode_with_tokenizers,
    encode_with_transformers,
    ids_around,
    load_files,
    load_with_transformers,
    transformers_name,
)
from megatron_btx.tokenizers.vocabulary import (
    CONFIG_FILE,
    HF_FOLDER,
    TOKENIZER_FILE,
    ModelTokenizer,
    UnknownVocabularyError,
    Vocabulary,
    old_megatrons_tokens,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

FLAG = "--allow-other-ids"
_BUILDS_ITS_OWN = ("qwen2",)
"""Model types for which transformers 5 takes the class of its own table, whatever the tokenizer's files say."""
_GPT2_END = "<|endoftext|>"
_SENTENCEPIECE_KINDS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ResultTokenizer:
    """The tokenizer of a result."""

    files: Mapping[str, bytes]
    """Its files, and those that travel with them; none where the source has no tokenizer."""
    record: Mapping[str, Any]
    """What was done and proved, for the manifest."""
    rows: int
    """Tokens from this number on have no row."""

    @property
    def ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, those that there are."""
        return written_files.special_ids(self.files, self.rows)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Files that may be written, and what they must be equal to."""

    reference: Reference
    files: Mapping[str, bytes]
    form: str
    """Where they come from, in words."""
    special: Sequence[str]
    """Tokens with a meaning of their own."""
    asked: _Config | None
    """The result's configuration, where transformers is to read the files, too."""


def result_tokenizer(source: ModelTokenizer, model_config: _Config, allow_other_ids: bool) -> ResultTokenizer:
    """Make and prove the tokenizer of a result.

    Args:
        source: the tokenizer of the model that it is taken from.
        model_config: the result's config.json; transformers takes some classes by its model type.
        allow_other_ids: write it even where it cannot be proved.

    Raises:
        InputError: the written tokenizer gives a text other ids, or there is no form for it; names the first text.
    """
    place = source.place
    if place is None:
        record = {"said": "no tokenizer came along", "texts": 0}
        return ResultTokenizer(written_files.travelling_files(source.arguments["hf_folder"]), record, source.rows)
    asked = None
    if model_config.get("model_type") in _BUILDS_ITS_OWN:
        asked = model_config
    try:
        if place.is_dir():
            candidates = _of_folder(source, place, model_config, asked)
        else:
            candidates = [_of_file(source, place, asked, allow_other_ids)]
        return _first_proved(candidates, source.rows, allow_other_ids)
    except InputError as error:
        if not allow_other_ids:
            raise InputError(f"{source.model}: {error}") from error
        record = {"said": f"not proved, {FLAG} was given: {error}", "texts": 0}
        return ResultTokenizer(written_files.travelling_files(place), record, source.rows)


def _first_proved(candidates: Sequence[_Candidate], rows: int, allow_other_ids: bool) -> ResultTokenizer:
    """The first candidate that gives the reference's ids; the first of all where the user allows other ids."""
    outcomes = []
    for candidate in candidates:
        outcome = _prove(candidate, rows)
        if isinstance(outcome, ResultTokenizer):
            return outcome
        outcomes.append(outcome)
    form, difference = candidates[0].form, outcomes[0]
    if not allow_other_ids:
        raise InputError(
            f"the tokenizer of the result ({form}) is not that of the source: {difference}; give the source a "
            f"tokenizer.json that makes its ids, or {FLAG} if you know better"
        )
    said = f"{form}; {FLAG} was given: {difference}"
    record = {"said": said, "form": form, "other_ids": difference.count, "first_text": difference.text}
    return ResultTokenizer(candidates[0].files, record, rows)


def _prove(candidate: _Candidate, rows: int) -> ResultTokenizer | Difference:
    """Compare written files with the source's own tokenizer."""
    tried, form, name = texts(candidate.special), candidate.form, candidate.reference.name
    readers = [encode_with_tokenizers(candidate.files)]
    if candidate.asked is not None:
        readers.append(encode_with_transformers(load_files(candidate.files, candidate.asked)))
    ties = compared = 0
    for encode in readers:
        difference, ties, compared = compare(candidate.reference, encode, tried, rows)
        if difference is not None:
            return difference
    library = f"tokenizers {version('tokenizers')}"
    said = f"{form}; {compared} texts get the ids of {name} in {library}"
    if ties:
        said += f", {ties} of them up to the order of equally probable pieces"
    if compared < len(tried):
        said += f"; {len(tried) - compared} texts hold a token without a row and were not compared"
    record = {"said": said, "form": form, "texts": compared, "ties": ties, "other_ids": 0}
    record |= {"read_by": name, "compared_with": library}
    return ResultTokenizer(candidate.files, record, rows)


# --- a Hugging Face folder ------------------------------------------------------------------------------------


def _of_folder(source: ModelTokenizer, folder: Path, model_config: _Config, asked: _Config | None) -> list[_Candidate]:
    """The folder's own files where every reader understands them alike, else what may be written, nearest first."""
    try:
        vocabulary = source.vocabulary
    except UnknownVocabularyError as error:
        raise InputError(f"its vocabulary cannot be read: {error}; {FLAG} carries the files as they are") from error
    files = written_files.travelling_files(folder)
    if written_files.has_written_form(files, source.rows) and asked is None:
        config = json.loads(files[CONFIG_FILE])
        special = [written_files.text_of(config[name]) for name in written_files.ALL_NAMES if config.get(name)]
        reference = Reference("the same file", encode_with_tokenizers(files))
        return [_Candidate(reference, files, f"tokenizer.json of {folder} as it is", special, None)]
    loaded = load_with_transformers(folder)
    name = transformers_name(loaded)
    _check_table(vocabulary, source.rows, loaded, folder)
    made = []
    if TOKENIZER_FILE in files:
        made.append((f"tokenizer.json of {folder}", json.loads(files[TOKENIZER_FILE])))
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        form = f"tokenizer.json made of what {name} reads in {folder}"
        if made:
            form += ", which gives other ids than the tokenizer.json there: another version may give others again"
        made.append((form, json.loads(backend.to_str())))
    if not made:
        raise InputError(
            f"{name} reads {folder} and has no tokenizer.json for it; save one with a fast tokenizer, or {FLAG} "
            "carries the files as they are"
        )
    reference = Reference(name, encode_with_transformers(loaded))
    special = [*loaded.all_special_tokens, *loaded.get_added_vocab()]
    candidates = []
    for form, content in made:
        tokenizer = written_files.drop_rowless_tokens(content, source.rows)
        config = _config_of(loaded, files, tokenizer, source.rows)
        written = written_files.make_files(files, tokenizer, config)
        candidates.append(_Candidate(reference, written, form, special, model_config))
    return candidates


def _check_table(vocabulary: Vocabulary, rows: int, loaded: PreTrainedTokenizerBase, folder: Path) -> None:
    """Some classes make a tokenizer of nothing where they find no file that they know."""
    tokens, numbers = vocabulary.below(rows), loaded.get_vocab()
    lost = [number for number, token in tokens.items() if numbers.get(token) != number]
    if not lost:
        return
    token = tokens[lost[0]]
    found = "no token"
    if token in numbers:
        found = f"token {numbers[token]}"
    raise InputError(
        f"{transformers_name(loaded)} reads {folder} without {len(lost)} tokens of {vocabulary.base.name}: "
        f"token {lost[0]} is {token!r}, there it is {found}; put a tokenizer.json into the folder, or {FLAG} carries "
        "the files as they are"
    )


def _config_of(
    loaded: PreTrainedTokenizerBase, files: Mapping[str, bytes], tokenizer: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    """The tokenizer_config.json to write beside a tokenizer.json."""
    tokens = {}
    for name in written_files.ALL_NAMES:
        token = getattr(loaded, name, None)
        if token is None:
            continue
        number = written_files.number_of_token(tokenizer, str(token))
        if number is not None and number < rows:
            tokens[name] = str(token)
    source = json.loads(files.get(CONFIG_FILE, b"{}"))
    if loaded.padding_side != "right":  # some classes pad on the left without saying so
        source["padding_side"] = loaded.padding_side
    adds = None
    if "add_bos_token" in source or "add_eos_token" in source:
        before, after = ids_around(loaded)
        only_bos = not before or ("bos_token" in tokens and before == [loaded.bos_token_id])
        only_eos = not after or ("eos_token" in tokens and after == [loaded.eos_token_id])
        if only_bos and only_eos:
            adds = bool(before), bool(after)
    return written_files.make_config(source, tokenizer, tokens, adds, loaded.all_special_tokens)


# --- files that a Megatron run names --------------------------------------------------------------------------


def _of_file(source: ModelTokenizer, place: Path, asked: _Config | None, allow_other_ids: bool) -> _Candidate:
    """A SentencePiece model, or GPT-2's two files."""
    kind = str(source.arguments.get("tokenizer_type"))
    if not place.is_file():
        raise InputError(f"its tokenizer {place} cannot be found; put it beside the checkpoint, or {FLAG} writes none")
    if kind in _SENTENCEPIECE_KINDS:
        return _of_sentencepiece(source.arguments, place, asked, allow_other_ids)
    if kind == "GPT2BPETokenizer":
        return _of_gpt2(source.arguments, asked)
    raise InputError(
        f"a {kind} ({place}) has no form that transformers reads; make a tokenizer.json of it and put it into the "
        f"folder {HF_FOLDER} of the checkpoint, or {FLAG} writes none"
    )


def _of_sentencepiece(
    stored: Mapping[str, Any], place: Path, asked: _Config | None, allow_other_ids: bool
) -> _Candidate:
    """A SentencePiece model; Megatron never makes a special token of a text, so neither does what is written."""
    import sentencepiece

    content = place.read_bytes()
    if stored.get("tokenizer_sentencepiece_ignore_extra_whitespaces") is False:
        raise InputError(
            f"tokenizer_sentencepiece_ignore_extra_whitespaces is off, which no tokenizer.json says; {FLAG} writes none"
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    added = old_megatrons_tokens(pieces, stored)
    if added and stored.get("tokenizer_type") == "Llama2Tokenizer":
        raise InputError(f"a Llama2Tokenizer with extra ids has no form in tokenizer.json; {FLAG} writes none")
    converted = sentencepiece_tokenizer.convert(content, added)
    if converted.inexpressible and not allow_other_ids:
        reasons = "; ".join(converted.inexpressible)
        raise InputError(f"{place} has no equal tokenizer.json: {reasons}; {FLAG} writes the nearest one")
    tokenizer = json.loads(converted.tokenizer.to_str())
    config = written_files.make_config({}, tokenizer, converted.named, (False, False))
    config |= {"split_special_tokens": True, "add_prefix_space": converted.dummy_prefix}
    if stored.get("max_position_embeddings"):
        config["model_max_length"] = stored["max_position_embeddings"]
    files = written_files.make_files({"tokenizer.model": content}, tokenizer, config)

    def encode(texts: Sequence[str], whole: bool) -> Ids:
        return [_around_added(model, text, added, len(pieces)) for text in texts]

    proto = sentencepiece_tokenizer.read_model(content)
    scored = []
    if proto.trainer_spec.model_type == sentencepiece_tokenizer.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
    special = [*converted.named.values(), *added]
    special += [piece for piece in ("<0x0A>", "\n") if piece in pieces]
    special += sentencepiece_tokenizer.pieces_of_type(proto, sentencepiece_tokenizer.USER_DEFINED)
    reference = Reference(f"sentencepiece {version('sentencepiece')}", encode, scored)
    return _Candidate(reference, files, f"tokenizer.json made of {place}", special, asked)


def _around_added(model: SentencePieceProcessor, text: str, added: Sequence[str], first: int) -> list[int]:
    """Ids as Megatron before its core tokenizers made them: tokens of its own are found before anything else."""
    places = [(text.find(token), token) for token in added if token in text]
    if not places:
        return list(model.encode(text))
    place, token = min(places)
    rest = _around_added(model, text[place + len(token) :], added, first)
    return [*model.encode(text[:place]), first + added.index(token), *rest]


def _of_gpt2(stored: Mapping[str, Any], asked: _Config | None) -> _Candidate:
    """GPT-2's vocabulary and merges, as transformers' own class for them reads them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = stored.get("vocab_file"), stored.get("merge_file")
    if not vocabulary or not merges or not Path(merges).is_file():
        raise InputError(
            f"a GPT2BPETokenizer needs both its files, found vocab_file {vocabulary} and merge_file {merges}; put them "
            f"beside the checkpoint, or {FLAG} writes none"
        )
    carried = {"vocab.json": Path(vocabulary).read_bytes(), "merges.txt": Path(merges).read_bytes()}
    loaded = load_files({**carried, CONFIG_FILE: b'{"tokenizer_class": "GPT2Tokenizer"}'}, {"model_type": "gpt2"})
    refused = f"{vocabulary} and {merges} are no vocabulary and merges of GPT-2's form"
    with bare_exceptions_as(lambda error: InputError(f"{refused} ({error})")):
        made = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {}
    if made.token_to_id(_GPT2_END) is not None:
        made.add_special_tokens([AddedToken(_GPT2_END, special=True, normalized=False)])
        named = {"bos_token": _GPT2_END, "eos_token": _GPT2_END}
    tokenizer = json.loads(made.to_str())
    config = written_files.make_config({}, tokenizer, named, None)
    files = written_files.make_files(carried, tokenizer, config)
    reference = Reference(transformers_name(loaded), encode_with_transformers(loaded))
    form = f"tokenizer.json made of {vocabulary} and {merges}"
    return _Candidate(reference, files, form, list(named.values()), asked)
