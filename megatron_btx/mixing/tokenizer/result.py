"""Which tokenizer a result has: the source's own in a form that every reader understands alike, proved before writing.

Folders and checkpoints name tokenizers in many forms, and a form that is carried as it is can mean other ids to another
version of transformers. So the result gets a ``tokenizer.json`` and a class that only reads it. Where the source has
both, they are carried; else they are made: from the SentencePiece model, from GPT-2's two files, or from what the
installed transformers makes of the folder. Either way some hundred texts must get the ids that the source's own gives.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.tokenizers import sentencepiece as sentencepiece_tokenizer
from megatron_btx.checkpoint.tokenizers.files import with_old_megatrons_tokens
from megatron_btx.checkpoint.tokenizers.vocabulary import tokenizer_place, unknown_reason
from megatron_btx.ground.errors import InputError, bare_exceptions_as
from megatron_btx.mixing.sources import EMBEDDING, Source
from megatron_btx.mixing.tokenizer import files as written
from megatron_btx.mixing.tokenizer.proof import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Difference,
    Ids,
    Oracle,
    compare,
    encode_with_transformers,
    load_with_transformers,
    read_tokenizer,
    read_written,
)
from megatron_btx.mixing.tokenizer.texts import texts as texts_with

FLAG = "--allow-other-ids"
GPT2_END = "<|endoftext|>"
_SENTENCEPIECE_KINDS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_BUILDS_ITS_OWN = ("qwen2",)
"""Model types for which transformers 5 takes the class of its own table, whatever the tokenizer's files say."""
_NAMED = ("unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")


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
        return written.special_ids(self.files, self.rows)

    @property
    def line(self) -> str:
        """What was done and proved, in words."""
        return str(self.record["said"])


def result_tokenizer(source: Source, model_config: Mapping[str, Any], allow_other_ids: bool) -> ResultTokenizer:
    """Make and prove the tokenizer of a result.

    Args:
        source: the source whose tokenizer it is.
        model_config: the result's config.json; transformers takes some classes by its model type.
        allow_other_ids: write it even where it cannot be proved.

    Raises:
        InputError: the written tokenizer gives a text other ids, or there is no form for it; names the first text.
    """
    place = tokenizer_place(source.tokenizer_arguments)
    rows = source.pieces[EMBEDDING].shape[0]
    if place is None:
        folder = source.hf_folder
        files = written.travelling_files(folder) if folder else {}
        return ResultTokenizer(files, {"said": "no tokenizer came along", "texts": 0}, rows)
    try:
        if place.is_dir():
            return _of_folder(source, place, rows, model_config, allow_other_ids)
        return _of_file(source, place, rows, model_config, allow_other_ids)
    except InputError as error:
        if not allow_other_ids:
            raise InputError(f"{source.name}: {error}") from error
        files = written.travelling_files(place) if place.is_dir() else {}
        return ResultTokenizer(files, {"said": f"not proved, {FLAG} was given: {error}", "texts": 0}, rows)


def _proved(
    oracle: Oracle,
    files: Mapping[str, bytes],
    rows: int,
    model_config: Mapping[str, Any] | None,
    tried: Sequence[str],
    form: str,
) -> ResultTokenizer | Difference:
    """Compare written files with the source's own tokenizer."""
    ties = 0
    for encode in read_written(files, model_config):
        difference, ties = compare(oracle, encode, tried, rows)
        if difference is not None:
            return difference
    tokenizers = f"tokenizers {importlib.metadata.version('tokenizers')}"
    tied = f", {ties} of them up to the order of equally probable pieces" if ties else ""
    said = f"{form}; {len(tried)} texts get the ids of {oracle.name} in {tokenizers}{tied}"
    record = {"said": said, "form": form, "texts": len(tried), "ties": ties, "other_ids": 0}
    record |= {"read_by": oracle.name, "compared_with": tokenizers}
    return ResultTokenizer(files, record, rows)


def _chosen(
    outcome: ResultTokenizer | Difference, files: Mapping[str, bytes], rows: int, form: str, allow: bool
) -> ResultTokenizer:
    if isinstance(outcome, ResultTokenizer):
        return outcome
    if not allow:
        raise InputError(
            f"the tokenizer of the result ({form}) is not that of the source: {outcome}; give the source a "
            f"tokenizer.json that makes its ids, or {FLAG} if you know better"
        )
    said = f"{form}; {FLAG} was given: {outcome}"
    record = {"said": said, "form": form, "other_ids": outcome.count, "first_text": outcome.text}
    return ResultTokenizer(files, record, rows)


# --- Hugging Face folders -------------------------------------------------------------------------------------


def _of_folder(
    source: Source, folder: Path, rows: int, model_config: Mapping[str, Any], allow: bool
) -> ResultTokenizer:
    """The folder's files where they say it all, else what the installed transformers makes of them."""
    why = unknown_reason(source.tokenizer_arguments)
    if why:
        raise InputError(f"its vocabulary cannot be read: {why}; {FLAG} carries the files as they are")
    files = written.travelling_files(folder)
    asked = model_config if model_config.get("model_type") in _BUILDS_ITS_OWN else None
    if written.plain(files, rows) and asked is None:
        form = f"tokenizer.json of {folder} as it is"
        config = json.loads(files[CONFIG_FILE])
        encode = read_tokenizer(files[TOKENIZER_FILE].decode(), bool(config.get("split_special_tokens")))
        oracle = Oracle("the same file", encode)
        return _chosen(_proved(oracle, files, rows, None, texts_with(_told(config)), form), files, rows, form, allow)
    loaded = load_with_transformers(folder)
    _check_table(source, loaded, folder)
    oracle = Oracle(_transformers_name(loaded), encode_with_transformers(loaded))
    wrong: list[tuple[Difference, dict[str, bytes], str]] = []
    for form, tokenizer in _candidates(loaded, files, folder, rows):
        config = _config_of(loaded, files, tokenizer, rows)
        made = written.written_files(files, tokenizer, config)
        outcome = _proved(oracle, made, rows, model_config, texts_with(_special_texts(loaded)), form)
        if isinstance(outcome, ResultTokenizer):
            return outcome
        wrong.append((outcome, made, form))
    difference, made, form = wrong[0]
    return _chosen(difference, made, rows, form, allow)


def _told(config: Mapping[str, Any]) -> list[str]:
    return [written.text_of(config[name]) for name in _NAMED if config.get(name)]


def _special_texts(loaded: Any) -> list[str]:
    return [*loaded.all_special_tokens, *loaded.get_added_vocab()]


def _transformers_name(loaded: Any) -> str:
    return f"{type(loaded).__name__} of transformers {importlib.metadata.version('transformers')}"


def _check_table(source: Source, loaded: Any, folder: Path) -> None:
    """Some classes make a tokenizer of nothing where they find no file that they know."""
    if source.tokens is None or source.vocabulary is None:
        return
    numbers = loaded.get_vocab()
    wrong = [number for number, token in source.tokens.items() if numbers.get(token) != number]
    if wrong:
        token = source.tokens[wrong[0]]
        found = numbers.get(token)
        there = "no token" if found is None else f"token {found}"
        raise InputError(
            f"{_transformers_name(loaded)} reads {folder} without {len(wrong)} tokens of "
            f"{source.vocabulary.base.name}: token {wrong[0]} is {token!r}, there it is {there}; put a tokenizer.json "
            f"into the folder, or {FLAG} carries the files as they are"
        )


def _candidates(loaded: Any, files: Mapping[str, bytes], folder: Path, rows: int) -> list[tuple[str, dict[str, Any]]]:
    """What may be written, the nearest to the source first."""
    backend = getattr(loaded, "backend_tokenizer", None)
    found = []
    if TOKENIZER_FILE in files:
        own = json.loads(files[TOKENIZER_FILE])
        found.append((f"tokenizer.json of {folder}", written.without_rowless(own, rows)))
    if backend is not None and hasattr(backend, "to_str"):
        made = json.loads(backend.to_str())
        form = f"tokenizer.json made of what {_transformers_name(loaded)} reads in {folder}"
        found.append((form, written.without_rowless(made, rows)))
    if not found:
        raise InputError(
            f"{_transformers_name(loaded)} reads {folder} and has no tokenizer.json for it; save one with a fast "
            f"tokenizer, or {FLAG} carries the files as they are"
        )
    return found


def _config_of(loaded: Any, files: Mapping[str, bytes], tokenizer: Mapping[str, Any], rows: int) -> dict[str, Any]:
    tokens = {}
    for name in _NAMED:
        token = getattr(loaded, name, None)
        number = written.number_of_token(tokenizer, str(token)) if token is not None else None
        if number is not None and number < rows:
            tokens[name] = str(token)
    source = json.loads(files.get(CONFIG_FILE, b"{}"))
    adds = None
    if "add_bos_token" in source or "add_eos_token" in source:
        adds = _added_around(loaded, tokens)
    return written.written_config(source, tokenizer, tokens, adds)


def _added_around(loaded: Any, tokens: Mapping[str, str]) -> tuple[bool, bool] | None:
    """Whether bos stands before and eos after a text; None where something else does."""
    bare, whole = (list(loaded("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            before = [loaded.bos_token_id] if bos and "bos_token" in tokens else []
            after = [loaded.eos_token_id] if eos and "eos_token" in tokens else []
            if whole == [*before, *bare, *after]:
                return bool(before), bool(after)
    return None


# --- files that a Megatron run names --------------------------------------------------------------------------


def _of_file(source: Source, place: Path, rows: int, model_config: Mapping[str, Any], allow: bool) -> ResultTokenizer:
    kind = str(source.arguments.get("tokenizer_type"))
    if not place.is_file():
        raise InputError(f"its tokenizer {place} cannot be found; put it beside the checkpoint, or {FLAG} writes none")
    if kind in _SENTENCEPIECE_KINDS:
        oracle, files, form, special = _of_sentencepiece(source, place, kind, allow)
    elif kind == "GPT2BPETokenizer":
        oracle, files, form, special = _of_gpt2(source)
    else:
        raise InputError(
            f"a {kind} ({place}) has no form that transformers reads; make a tokenizer.json of it and put it into "
            f"{source.root / 'huggingface'}, or {FLAG} writes none"
        )
    asked = model_config if model_config.get("model_type") in _BUILDS_ITS_OWN else None
    outcome = _proved(oracle, files, rows, asked, texts_with(special), form)
    return _chosen(outcome, files, rows, form, allow)


_Made = tuple[Oracle, dict[str, bytes], str, list[str]]


def _of_sentencepiece(source: Source, place: Path, kind: str, allow: bool) -> _Made:
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
    if converted.inexpressible and not allow:
        reasons = "; ".join(converted.inexpressible)
        raise InputError(f"{place} has no equal tokenizer.json: {reasons}; {FLAG} writes the nearest one")
    tokenizer = json.loads(converted.tokenizer.to_str())
    config = written.written_config({}, tokenizer, converted.named, (False, False))
    config |= {"split_special_tokens": True, "add_prefix_space": converted.dummy_prefix}
    if stored.get("max_position_embeddings"):
        config["model_max_length"] = stored["max_position_embeddings"]
    files = written.written_files({"tokenizer.model": content}, tokenizer, config)

    def encode(texts: Sequence[str], whole: bool) -> Ids:
        return [_around_added(model, text, added, len(pieces)) for text in texts]

    proto = sentencepiece_tokenizer.read_model(content)
    scored = [(piece.piece, piece.score) for piece in proto.pieces] if proto.trainer_spec.model_type == 1 else []
    name = f"sentencepiece {importlib.metadata.version('sentencepiece')}"
    own = [*converted.named.values(), *added]
    own += [piece for piece in pieces if piece in ("<0x0A>", "\n")] + _user_defined(content)
    return Oracle(name, encode, scored), files, f"tokenizer.json made of {place}", own


def _user_defined(content: bytes) -> list[str]:
    return [piece.piece for piece in sentencepiece_tokenizer.read_model(content).pieces if piece.type == 4]


def _around_added(model: Any, text: str, added: Sequence[str], first: int) -> list[int]:
    """Ids as Megatron before its core tokenizers made them: tokens of its own are found before anything else."""
    place, token = min(((text.find(token), token) for token in added if token in text), default=(-1, ""))
    if place < 0:
        return list(model.encode(text))
    rest = _around_added(model, text[place + len(token) :], added, first)
    return [*model.encode(text[:place]), first + added.index(token), *rest]


def _of_gpt2(source: Source) -> _Made:
    """GPT-2's vocabulary and merges, as transformers' own class for them reads them."""
    stored = source.arguments
    vocabulary, merges = stored.get("vocab_file"), stored.get("merge_file")
    if not vocabulary or not merges or not Path(merges).is_file():
        raise InputError(
            f"a GPT2BPETokenizer needs both its files, found vocab_file {vocabulary} and merge_file {merges}; put them "
            f"beside the checkpoint, or {FLAG} writes none"
        )
    carried = {"vocab.json": Path(vocabulary).read_bytes(), "merges.txt": Path(merges).read_bytes()}
    loaded = _gpt2(carried)
    tokenizer = _byte_level(Path(vocabulary), Path(merges))
    named = {}
    if written.number_of_token(tokenizer, GPT2_END) is not None:
        named = {"bos_token": GPT2_END, "eos_token": GPT2_END}
    config = written.written_config({}, tokenizer, named, None)
    files = written.written_files(carried, tokenizer, config)
    oracle = Oracle(_transformers_name(loaded), encode_with_transformers(loaded))
    return oracle, files, f"tokenizer.json made of {vocabulary} and {merges}", list(named.values())


def _gpt2(files: Mapping[str, bytes]) -> Any:
    """The tokenizer that transformers makes of GPT-2's two files."""
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            (Path(place) / name).write_bytes(content)
        (Path(place) / CONFIG_FILE).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        (Path(place) / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        return load_with_transformers(Path(place))


def _byte_level(vocabulary: Path, merges: Path) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's two files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    refused = f"{vocabulary} and {merges} are no vocabulary and merges of GPT-2's form"
    with bare_exceptions_as(lambda error: InputError(f"{refused} ({error})")):
        made = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if made.token_to_id(GPT2_END) is not None:
        made.add_special_tokens([AddedToken(GPT2_END, special=True, normalized=False)])
    content: dict[str, Any] = json.loads(made.to_str())
    return content
