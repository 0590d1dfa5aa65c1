"""The tokenizer of files that a Megatron run names: a SentencePiece model, or GPT-2's two files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.tokenizers import sentencepiece as sentencepiece_tokenizer
from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.files import with_old_megatrons_tokens
from megatron_btx.tokenizers.from_folder import config_to_ask, transformers_name
from megatron_btx.tokenizers.outcome import FLAG, ResultTokenizer, accept, prove
from megatron_btx.tokenizers.texts import texts as texts_with
from megatron_btx.tokenizers.verify import (
    CONFIG_FILE,
    Ids,
    Oracle,
    encode_with_transformers,
    load_files,
)
from megatron_btx.tokenizers.vocabulary import ModelTokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_GPT2_END = "<|endoftext|>"
_SENTENCEPIECE_KINDS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_UNIGRAM, _USER_DEFINED = 1, 4
"""Of SentencePiece's model: a type of model, and a type of piece."""


@dataclasses.dataclass(frozen=True)
class _Made:
    """Files that were made, and what they must be equal to."""

    oracle: Oracle
    files: dict[str, bytes]
    form: str
    """Where they come from, in words."""
    special: list[str]
    """Tokens with a meaning of their own."""


def file_tokenizer(
    source: ModelTokenizer, place: Path, model_config: Mapping[str, Any], allow_other_ids: bool
) -> ResultTokenizer:
    """Make and prove the tokenizer of a file.

    Raises:
        InputError: there is no form for it that transformers reads, or the form gives a text other ids.
    """
    kind = str(source.arguments.get("tokenizer_type"))
    if not place.is_file():
        raise InputError(f"its tokenizer {place} cannot be found; put it beside the checkpoint, or {FLAG} writes none")
    if kind in _SENTENCEPIECE_KINDS:
        made = _of_sentencepiece(source, place, kind, allow_other_ids)
    elif kind == "GPT2BPETokenizer":
        made = _of_gpt2(source)
    else:
        raise InputError(
            f"a {kind} ({place}) has no form that transformers reads; make a tokenizer.json of it and put it into "
            f"{source.root / 'huggingface'}, or {FLAG} writes none"
        )
    texts = texts_with(made.special)
    outcome = prove(made.oracle, made.files, source.rows, config_to_ask(model_config), texts, made.form)
    return accept(outcome, made.files, source.rows, made.form, allow_other_ids)


# --- SentencePiece --------------------------------------------------------------------------------------------


def _of_sentencepiece(source: ModelTokenizer, place: Path, kind: str, allow_other_ids: bool) -> _Made:
    """A SentencePiece model; Megatron never makes a special token of a text, so neither does what is written."""
    import sentencepiece

    content = place.read_bytes()
    stored = source.arguments
    if stored.get("tokenizer_sentencepiece_ignore_extra_whitespaces") is False:
        raise InputError(
            f"tokenizer_sentencepiece_ignore_extra_whitespaces is off, which no tokenizer.json says; {FLAG} writes none"
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    added = [token for token in with_old_megatrons_tokens(pieces, kind, stored) if token not in pieces]
    if added and kind == "Llama2Tokenizer":
        raise InputError(f"a Llama2Tokenizer with extra ids has no form in tokenizer.json; {FLAG} writes none")
    converted = sentencepiece_tokenizer.convert(content, added)
    if converted.inexpressible and not allow_other_ids:
        reasons = "; ".join(converted.inexpressible)
        raise InputError(f"{place} has no equal tokenizer.json: {reasons}; {FLAG} writes the nearest one")
    tokenizer = json.loads(converted.tokenizer.to_str())
    config = tokenizer_files.make_config({}, tokenizer, converted.named, (False, False))
    config |= {"split_special_tokens": True, "add_prefix_space": converted.dummy_prefix}
    if stored.get("max_position_embeddings"):
        config["model_max_length"] = stored["max_position_embeddings"]
    files = tokenizer_files.make_files({"tokenizer.model": content}, tokenizer, config)

    def encode(texts: Sequence[str], whole: bool) -> Ids:
        return [_around_added(model, text, added, len(pieces)) for text in texts]

    name = f"sentencepiece {importlib.metadata.version('sentencepiece')}"
    special = [*converted.named.values(), *added]
    for piece in ("<0x0A>", "\n"):
        if piece in pieces:
            special.append(piece)
    special += _user_defined(content)
    return _Made(Oracle(name, encode, _scored(content)), files, f"tokenizer.json made of {place}", special)


def _scored(content: bytes) -> list[tuple[str, float]]:
    """Text and score of every piece of a Unigram model; none for other kinds."""
    proto = sentencepiece_tokenizer.read_model(content)
    if proto.trainer_spec.model_type != _UNIGRAM:
        return []
    return [(piece.piece, piece.score) for piece in proto.pieces]


def _user_defined(content: bytes) -> list[str]:
    pieces = sentencepiece_tokenizer.read_model(content).pieces
    return [piece.piece for piece in pieces if piece.type == _USER_DEFINED]


def _around_added(model: SentencePieceProcessor, text: str, added: Sequence[str], first: int) -> list[int]:
    """Ids as Megatron before its core tokenizers made them: tokens of its own are found before anything else."""
    places = [(text.find(token), token) for token in added if token in text]
    if not places:
        return list(model.encode(text))
    place, token = min(places)
    rest = _around_added(model, text[place + len(token) :], added, first)
    return [*model.encode(text[:place]), first + added.index(token), *rest]


# --- GPT-2 ----------------------------------------------------------------------------------------------------


def _of_gpt2(source: ModelTokenizer) -> _Made:
    """GPT-2's vocabulary and merges, as transformers' own class for them reads them."""
    stored = source.arguments
    vocabulary, merges = stored.get("vocab_file"), stored.get("merge_file")
    if not vocabulary or not merges or not Path(merges).is_file():
        raise InputError(
            f"a GPT2BPETokenizer needs both its files, found vocab_file {vocabulary} and merge_file {merges}; put them "
            f"beside the checkpoint, or {FLAG} writes none"
        )
    carried = {"vocab.json": Path(vocabulary).read_bytes(), "merges.txt": Path(merges).read_bytes()}
    loaded = load_files({**carried, CONFIG_FILE: b'{"tokenizer_class": "GPT2Tokenizer"}'}, {"model_type": "gpt2"})
    tokenizer = _byte_level(Path(vocabulary), Path(merges))
    named = {}
    if tokenizer_files.number_of_token(tokenizer, _GPT2_END) is not None:
        named = {"bos_token": _GPT2_END, "eos_token": _GPT2_END}
    config = tokenizer_files.make_config({}, tokenizer, named, None)
    files = tokenizer_files.make_files(carried, tokenizer, config)
    oracle = Oracle(transformers_name(loaded), encode_with_transformers(loaded))
    return _Made(oracle, files, f"tokenizer.json made of {vocabulary} and {merges}", list(named.values()))


def _byte_level(vocabulary: Path, merges: Path) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's two files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    refused = f"{vocabulary} and {merges} are no vocabulary and merges of GPT-2's form"
    with bare_exceptions_as(lambda error: InputError(f"{refused} ({error})")):
        made = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if made.token_to_id(_GPT2_END) is not None:
        made.add_special_tokens([AddedToken(_GPT2_END, special=True, normalized=False)])
    content: dict[str, Any] = json.loads(made.to_str())
    return content
