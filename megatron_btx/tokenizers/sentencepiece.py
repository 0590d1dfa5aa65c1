"""A SentencePiece model as a ``tokenizer.json``, which servers and both versions of transformers read alike.

A folder with ``tokenizer.model`` alone means other ids in transformers 4.57 and 5, because each has classes that guess
what the model file says. So the model's own rules are written out: its normaliser, dummy prefix, treatment of blanks,
merges or scores, byte fallback and user-defined pieces. What ``tokenizers`` cannot express is told.

Source: what sentencepiece 0.2 does (its normalizer.cc, bpe_model.cc and unigram_model.cc).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made on import
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""
UNIGRAM, BPE = 1, 2
"""Types of models; 3 and 4 are of words and of characters."""
BLANK = "▁"
_NEVER = 100
"""Longer than any special token's text: so many of the worst pieces are better than one such token."""
_SEPARATOR, *_STAND_INS = map(chr, range(0xFDD0, 0xFDF0))
"""Code points that Unicode keeps out of texts."""


# --- a model file: those fields of its protocol buffer that decide how texts are cut ----------------------------


def read_model(content: bytes) -> ModelProto:
    """The model that a file's bytes hold; raises InputError where they hold none."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made on import

    try:
        return ModelProto.FromString(content)
    except DecodeError as error:
        raise InputError("it is no SentencePiece model") from error


def pieces_of_type(model: ModelProto, *types: int) -> list[str]:
    """The texts of all pieces of some types, in the model's order."""
    return [piece.piece for piece in model.pieces if piece.type in types]


# --- what it becomes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a SentencePiece model became."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    """unk_token, bos_token, eos_token and pad_token, those that the model has."""
    dummy_prefix: bool
    """Whether a blank is put before every text."""
    inexpressible: tuple[str, ...]
    """Rules that ``tokenizers`` does not have, in words: texts that meet them get other ids."""


def convert(content: bytes, added: Sequence[str] = ()) -> Converted:
    """Build the tokenizer of a model file; InputError for what is none, or a model without BPE and Unigram.

    ``added`` are tokens that follow the pieces, found in a text before anything else.
    """
    model = read_model(content)
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise InputError("SentencePiece models of words or characters have no form in tokenizer.json")
    reasons: list[str] = []
    if model.trainer_spec.model_type == UNIGRAM:
        tokenizer = _build_unigram(model, reasons)
    else:
        tokenizer = _build_byte_pairs(model, reasons)
    normaliser = _normaliser(model, content, reasons)
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    tokenizer.decoder = _decoder(model)
    _add_tokens(tokenizer, model, added)
    if pieces_of_type(model, UNUSED):
        reasons.append("it has unused pieces")
    if model.trainer_spec.treat_whitespace_as_suffix:
        reasons.append("it writes blanks after words")
    return Converted(tokenizer, _named(model), bool(model.normalizer_spec.add_dummy_prefix), tuple(reasons))


def _named(model: ModelProto) -> dict[str, str]:
    """Special tokens by their numbers: a number of -1 says that there is none."""
    spec, found = model.trainer_spec, {}
    for name in ("unk", "bos", "eos", "pad"):
        number = getattr(spec, f"{name}_id")
        if 0 <= number < len(model.pieces) and model.pieces[number].type in (CONTROL, UNKNOWN):
            found[f"{name}_token"] = model.pieces[number].piece
    return found


# --- the model ------------------------------------------------------------------------------------------------


def _build_byte_pairs(model: ModelProto, reasons: list[str]) -> Tokenizer:
    """Byte pairs: two neighbours are merged where their text is a piece, the highest score first."""
    from tokenizers import Tokenizer, models

    numbers = {piece.piece: number for number, piece in enumerate(model.pieces)}
    mergeable = {piece.piece: -piece.score for piece in model.pieces if piece.type in (NORMAL, UNUSED)}
    _refuse_lone_letters(mergeable.keys(), reasons)
    if len({*mergeable.values()}) < sum(len(piece) > 1 for piece in mergeable):
        reasons.append("several pieces have one score")
    unknown = next(iter(pieces_of_type(model, UNKNOWN)), None)
    fallback = bool(model.trainer_spec.byte_fallback)
    byte_pairs = models.BPE(numbers, _merges_of(mergeable), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    made = Tokenizer(byte_pairs)
    whole = [piece for piece in pieces_of_type(model, USER_DEFINED) if len(piece) > 1]
    if not whole or not model.normalizer_spec.add_dummy_prefix:
        return made  # one letter is one symbol anyway; longer pieces are added tokens, see _add_tokens
    encoded = made.encode_batch(list(mergeable), add_special_tokens=False)
    # A piece that its own text does not become: it would, if whole words were looked up first.
    unmade = [piece for piece, found in zip(mergeable, encoded, strict=True) if found.ids != [numbers[piece]]]
    if unmade:
        reasons.append(f"merges never make the piece {unmade[0]!r}, and it has pieces of the user's own")
    byte_pairs.ignore_merges = True
    made.pre_tokenizer = _cut_out(whole, pieces_of_type(model, CONTROL, UNKNOWN, BYTE))
    return made


def _merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, in the order in which they are tried: by rank, then by cut."""
    merges = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def _build_unigram(model: ModelProto, reasons: list[str]) -> Tokenizer:
    """The most probable pieces. A piece of the user's own wins over all: SentencePiece scores it by its length.

    Special tokens and bytes are never found in a text by SentencePiece. Here they are in the same table as the rest, so
    they get a score with which any other way wins.
    """
    from tokenizers import Tokenizer, models

    _refuse_lone_letters(set(pieces_of_type(model, NORMAL)), reasons)
    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    best, never = max(normal, default=0.0), min([*normal, -1.0]) * _NEVER
    scores = []
    for piece in model.pieces:
        score = never
        if piece.type in (NORMAL, UNUSED):
            score = piece.score
        elif piece.type == USER_DEFINED:
            score = len(piece.piece.encode()) * best - 0.1
        scores.append((piece.piece, score))
    fallback = bool(model.trainer_spec.byte_fallback)
    return Tokenizer(models.Unigram(scores, unk_id=model.trainer_spec.unk_id, byte_fallback=fallback))


def _refuse_lone_letters(pieces: Collection[str], reasons: list[str]) -> None:
    """SentencePiece builds pieces from any letters, tokenizers from those that are pieces themselves."""
    letters = set("".join(pieces))
    alone = sorted(letters.difference(pieces))
    if alone:
        reasons.append(f"the letter {alone[0]!r} is part of pieces and no piece itself")


def _cut_out(pieces: Sequence[str], hidden: Sequence[str]) -> Any:
    """Pieces of the user's own stand alone; what stands between them and is the text of a special token is no token."""
    from tokenizers import Regex, pre_tokenizers

    alone = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    cuts = [pre_tokenizers.Split(Regex(alone), behavior="isolated")]
    halves = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])}\\z)" for text in hidden if len(text) > 1)
    if halves:
        cuts.append(pre_tokenizers.Split(Regex(f"\\A(?:{halves})"), behavior="isolated"))
    return pre_tokenizers.Sequence(cuts)


def _add_tokens(tokenizer: Tokenizer, model: ModelProto, added: Sequence[str]) -> None:
    """Special tokens, never made from a text; then the user's own pieces and added tokens, found before all else."""
    from tokenizers import AddedToken

    spec = model.normalizer_spec
    for piece in model.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == USER_DEFINED and not spec.add_dummy_prefix:
            # Where blanks are taken away at a text's ends, it has to be cut at them after that.
            after = bool(spec.remove_extra_whitespaces)
            tokenizer.add_tokens([AddedToken(piece.piece, special=False, normalized=after)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.encode_special_tokens = True


# --- what is done to a text before -----------------------------------------------------------------------------


def _normaliser(model: ModelProto, content: bytes, reasons: list[str]) -> Any:
    """The normaliser, the blanks and the dummy prefix, in SentencePiece's order; None for nothing at all."""
    from tokenizers import Regex, normalizers

    spec = model.normalizer_spec
    characters = _characters(model, content, reasons)
    prefix = []
    if spec.add_dummy_prefix:
        prefix = [normalizers.Prepend(" ")]
    if spec.remove_extra_whitespaces:
        strip = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps: list[Any] = [*characters, *strip, *prefix]
    else:
        steps = [*prefix, *characters]  # a text of which no letter is kept has its prefix all the same
    blank = " "
    if spec.escape_whitespaces:
        blank = BLANK
        steps.append(normalizers.Replace(" ", BLANK))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{blank}+\\z"), ""))
    if not steps:
        return None
    return normalizers.Sequence(steps)


def _characters(model: ModelProto, content: bytes, reasons: list[str]) -> list[Any]:
    """The map of characters, without what ``tokenizers`` makes of it besides.

    ``tokenizers`` looks up what a reader takes for one character (a letter and its marks, "\\r\\n") as a whole, goes by
    the first part of it that the map has, and drops the rest. So every code point is set apart before, and what the map
    has for several of them, composed letters, is composed before and after.
    """
    from tokenizers import Regex, normalizers

    charsmap = model.normalizer_spec.precompiled_charsmap
    if not charsmap:
        return []
    apply_map = _map_of_characters(content)
    composing = []
    if apply_map("A\u030a") in ("\u00c5", "\u00e5"):
        composing = [normalizers.NFC()]
    kept = [piece for piece in pieces_of_type(model, USER_DEFINED) if apply_map(piece) != piece]
    if len(kept) > len(_STAND_INS):
        reasons.append(f"{len(kept)} pieces of the user's own are kept from its map of characters")
    hidden = dict(zip(sorted(kept, key=len, reverse=True), _STAND_INS, strict=False))
    hide = [normalizers.Replace(piece, stand_in) for piece, stand_in in hidden.items()]
    show = [normalizers.Replace(stand_in, piece) for piece, stand_in in hidden.items()]
    separated = [
        normalizers.Replace(Regex("(?m)(?<=.)(?=.)"), _SEPARATOR),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(_SEPARATOR, ""),
    ]
    return [*hide, *composing, *separated, *composing, *show]


def _map_of_characters(content: bytes) -> Callable[[str], str]:
    """What the map alone makes of a text."""
    import sentencepiece

    model = read_model(content)
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = False
    for piece in model.pieces:
        if piece.type == USER_DEFINED:
            piece.type = NORMAL
    normalise: Callable[[str], str] = sentencepiece.SentencePieceProcessor(
        model_proto=model.SerializeToString()
    ).normalize
    return normalise


def _decoder(model: ModelProto) -> Any:
    """From tokens to text: blanks back, bytes together, the dummy prefix away."""
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(BLANK, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
