"""A SentencePiece model file: its protocol buffer, and those of its fields that decide how texts are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from megatron_btx.common.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""
UNIGRAM, BPE = 1, 2
"""Types of models; 3 and 4 are of words and of characters."""


class ModelPiece(Protocol):
    """One piece of a model."""

    piece: str
    score: float
    type: int


class TrainerSpec(Protocol):
    """How the model was trained."""

    model_type: int
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    unk_id: int


class NormalizerSpec(Protocol):
    """What is done to a text before it is cut."""

    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


class Model(Protocol):
    """The protocol buffer of a model file."""

    pieces: Sequence[ModelPiece]
    trainer_spec: TrainerSpec
    normalizer_spec: NormalizerSpec

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The content of a model file."""
        ...


def read_model(content: bytes) -> Model:
    """The model that a file's bytes hold.

    Raises:
        InputError: they hold none.
        ModuleNotFoundError: protobuf is not installed.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = vars(sentencepiece_model_pb2)["ModelProto"]()  # this class is made when the module is imported
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise InputError("it is no SentencePiece model") from error
    return cast(Model, model)


def pieces_of_type(model: Model, *types: int) -> list[str]:
    """The texts of all pieces of some types, in the model's order."""
    return [piece.piece for piece in model.pieces if piece.type in types]
