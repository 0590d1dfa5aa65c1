"""Proof of a written tokenizer: the same ids as the source's own tokenizer, text by text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.tokenizers.vocabulary import CONFIG_FILE, TOKENIZER_FILE, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[list[int]]
Encode = Callable[[Sequence[str], bool], Ids]
"""From texts to ids; the second argument asks for what a tokenizer puts before and after a text."""
_SHOWN_IDS = 12
_ROUNDING = 1e-6
"""SentencePiece adds scores up in fp32."""
_TRANSFORMERS_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The tokenizer that a model was trained with."""

    name: str
    """What reads it, with its version."""
    encode: Encode
    pieces: Sequence[tuple[str, float]] = ()
    """For Unigram models: text and score of every piece. Where two ways to cut a text have one sum of scores, rounding
    chooses."""

    def ties(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether both ways to cut a text are as probable, and spell the same."""
        if max(*one, *other, 0) >= len(self.pieces):
            return False
        text, score = self._spell(one)
        other_text, other_score = self._spell(other)
        return text == other_text and math.isclose(score, other_score, rel_tol=_ROUNDING)

    def _spell(self, ids: Sequence[int]) -> tuple[str, float]:
        pieces = [self.pieces[i] for i in ids]
        text = "".join(text for text, _ in pieces)
        return text, math.fsum(score for _, score in pieces)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first text with other ids."""

    text: str
    expected: Sequence[int]
    found: Sequence[int]
    count: int
    """Texts that have other ids."""

    def __str__(self) -> str:
        return (
            f"{self.count} texts get other ids, the first is {self.text[:60]!r}: {_show_ids(self.expected)} in the "
            f"source's own, {_show_ids(self.found)} in the written one"
        )


def _show_ids(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    if len(ids) > _SHOWN_IDS:
        shown += ", ..."
    return f"[{shown}]"


def compare(
    reference: Reference, encode: Encode, texts: Sequence[str], rows: int
) -> tuple[Difference | None, int, int]:
    """The first difference of two tokenizers, how many texts differ by a tie alone, and how many were compared.

    A text that holds a token without a row is left out: the model cannot read it. No such token may stand around one.
    """
    wrong: list[tuple[str, list[int], list[int]]] = []
    readable = [max(ids, default=0) < rows for ids in reference.encode(texts, False)]
    ties = 0
    for whole in (False, True):
        pairs = zip(texts, reference.encode(texts, whole), encode(texts, whole), strict=True)
        for text, given, found in itertools.compress(pairs, readable):
            expected = [number for number in given if number < rows]
            if expected == found:
                continue
            if not reference.ties(expected, found):
                wrong.append((text, expected, found))
            elif not whole:
                ties += 1
    if not wrong:
        return None, ties, sum(readable)
    count = len({text for text, _, _ in wrong})
    return Difference(*wrong[0], count), ties, sum(readable)


def encode_with_tokenizers(files: Mapping[str, bytes]) -> Encode:
    """How the ``tokenizers`` library encodes by files, and so every class of transformers that adds nothing."""
    tokenizer = load_tokenizer(files[TOKENIZER_FILE].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(json.loads(files[CONFIG_FILE]).get("split_special_tokens"))

    def encode(texts: Sequence[str], whole: bool) -> Ids:
        with bare_exceptions_as(lambda error: InputError(f"tokenizer.json cannot encode every text ({error})")):
            return [found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=whole)]

    return encode


def load_with_transformers(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of a folder, without its code; raises InputError where it makes none."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), bare_exceptions_as(lambda error: ValueError(str(error))):
            warnings.simplefilter("ignore")
            return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except _TRANSFORMERS_ERRORS as error:
        said = re.sub(r"\s+", " ", str(error))[:160]
        raise InputError(
            f"transformers {transformers.__version__} makes no tokenizer of {folder} ({type(error).__name__}: {said}); "
            "put a tokenizer.json that it reads into the folder, or --allow-other-ids carries the files as they are"
        ) from error


def transformers_name(loaded: PreTrainedTokenizerBase) -> str:
    """The class that reads a tokenizer, with the version of transformers."""
    return f"{type(loaded).__name__} of transformers {importlib.metadata.version('transformers')}"


def ids_around(loaded: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids before and after a text."""
    encode = encode_with_transformers(loaded)
    bare, whole = encode(["a"], False)[0], encode(["a"], True)[0]
    starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
    start = next(starts, len(whole))
    return whole[:start], whole[start + len(bare) :]


def encode_with_transformers(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """How a loaded tokenizer of transformers encodes."""
    unable = "its own tokenizer cannot encode every text"

    def encode(texts: Sequence[str], whole: bool) -> Ids:
        with bare_exceptions_as(lambda error: InputError(f"{unable} ({error}); --allow-other-ids carries the files")):
            return [list(tokenizer(text, add_special_tokens=whole)["input_ids"]) for text in texts]

    return encode


def load_files(files: Mapping[str, bytes], model_config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """As :func:`load_with_transformers`, of files that lie in no folder yet."""
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            (Path(place) / name).parent.mkdir(exist_ok=True)
            (Path(place) / name).write_bytes(content)
        (Path(place) / "config.json").write_text(json.dumps(model_config))
        return load_with_transformers(Path(place))
