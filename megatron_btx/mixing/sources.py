"""The sources of a mix: any checkpoint that can be read, seen as the pieces it holds."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint import safetensors
from megatron_btx.checkpoint.beside import HF_FOLDER
from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.names import IGNORED_HF, IGNORED_MEGATRON, Dialect
from megatron_btx.checkpoint.pieces import Location, Piece, pieces_of
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.stored import Reader
from megatron_btx.checkpoint.tokenizers.vocabulary import Vocabulary, read_vocabulary
from megatron_btx.ground.errors import CheckpointError

if TYPE_CHECKING:
    import torch

EMBEDDING = "embedding.weight"
_HEAD_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Held:
    """A piece that a source holds: what it is, where it lies, and as what."""

    piece: Piece
    location: Location
    shape: tuple[int, ...]
    dtype: torch.dtype


class Source:
    """One model to be mixed or converted.

    Args:
        config: its config.json, of a Hugging Face model folder.

    Raises:
        CheckpointError: from the constructor: a tensor is missing, too much, or of another shape than the model's
            configuration says.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        reader: Reader,
        arguments: Mapping[str, Any],
        dialect: Dialect,
        sizes: Sizes,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.reader = reader
        self.arguments = arguments
        self.dialect = dialect
        self.sizes = sizes
        self.pieces: dict[str, Held] = {}
        unused = set(reader.tensors)
        if config is not None:
            where = f"{name} ({reader.folder})"
            unused -= shared_expert.names_without_effect(reader, config, self.sizes, where)
        self._hold(unused)

    @property
    def folder(self) -> Path:
        """Where the tensors lie."""
        return self.reader.folder

    @property
    def is_hugging_face(self) -> bool:
        """Whether the source is a Hugging Face model folder."""
        return isinstance(self.reader, safetensors.SafetensorsReader)

    @property
    def hf_folder(self) -> Path | None:
        """The folder with Hugging Face's configuration and tokenizer files, where there is one."""
        if self.is_hugging_face:
            return self.folder
        # Training that started from a result goes on in another folder, with the tokenizer where it was.
        tokenizer = self.arguments.get("tokenizer_model")
        places = [self.root / HF_FOLDER, *([Path(tokenizer)] if tokenizer else [])]
        return next((place for place in places if (place / safetensors.CONFIG).is_file()), None)

    def _hold(self, unused: set[str]) -> None:
        where = f"{self.name} ({self.folder})"
        tied = not self.arguments.get("untie_embeddings_and_output_weights")
        for piece in pieces_of(self.sizes):
            found = [loc for loc in piece.locations(self.dialect, self.sizes) if loc.key in self.reader.tensors]
            unused.difference_update(location.key for location in found)
            if piece.name.startswith("head.") and tied:
                if found:
                    self._check_tied_head(piece, found[0], where)
                continue
            if found:
                self.pieces[piece.name] = self._held(piece, found[0], where)
            elif piece.required or (piece.name == "head.weight" and not tied):
                location = piece.location(self.dialect, self.sizes)
                key = location.key if location else piece.name
                raise CheckpointError(f"{where}: {key} is missing; its configuration asks for it, so it is incomplete")
        ignored = IGNORED_HF if self.is_hugging_face else IGNORED_MEGATRON
        extra = sorted(key for key in unused if not any(re.fullmatch(pattern, key) for pattern in ignored))
        if extra:
            raise CheckpointError(
                f"{where}: {extra[0]} is no tensor of the model that its configuration describes; "
                "this architecture is not supported"
            )

    def _check_tied_head(self, piece: Piece, location: Location, where: str) -> None:
        """Some save the head of tied models too: it must be the embedding, which is what is used."""
        import torch

        embedding = self.pieces[EMBEDDING]
        head = self._held(piece, location, where)
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        for start in range(0, head.shape[0] if same else 0, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, head.shape[0])
            same = same and torch.equal(self._rows(head, start, stop), self._rows(embedding, start, stop))
        if not same:
            raise CheckpointError(
                f"{where}: {location.key} is stored and is not the embedding, though the configuration ties the two; "
                "say which is meant: untie them in the configuration, or leave the head out"
            )

    def _held(self, piece: Piece, location: Location, where: str) -> Held:
        stored = self.reader.tensors[location.key]
        rows = stored.shape[len(location.lead)] if len(stored.shape) > len(location.lead) else -1
        shape = tuple(rows if n == -1 else n for n in piece.shape)
        if piece.shape[0] == -1:
            location = dataclasses.replace(location, unit=rows)
        axes = tuple(getattr(self.sizes, {"layer": "layers", "expert": "experts"}[a]) for a in self._axes(piece))
        expected = (*axes, location.stored_rows, *shape[1:])
        if tuple(stored.shape) != expected:
            raise CheckpointError(
                f"{where}: {location.key}: {list(stored.shape)} is stored, its configuration says {list(expected)} "
                f"(layers {self.sizes.layers}, hidden {self.sizes.hidden}, feed-forward {self.sizes.ffn}, heads "
                f"{self.sizes.heads}, query groups {self.sizes.groups}, head size {self.sizes.head_size}, vocabulary "
                f"{self.sizes.vocabulary}); the two do not belong together"
            )
        if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            raise CheckpointError(
                f"{where}: {location.key}: {stored.dtype} is stored, expected bf16, fp16 or fp32; "
                "save the model unquantised"
            )
        return Held(piece, location, shape, stored.dtype)

    def _axes(self, piece: Piece) -> list[str]:
        return [axis for axis in self.dialect.axes if axis in piece.numbers]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a piece, in the dtype stored."""
        return self._rows(self.pieces[name], start, stop)

    def _rows(self, held: Held, start: int, stop: int) -> torch.Tensor:
        import torch

        location, rest = held.location, held.shape[1:]
        one = (1,) * len(location.lead)
        parts = [
            self.reader.read(location.key, (*location.lead, there, *(0,) * len(rest)), (*one, rows, *rest)).view(
                rows, *rest
            )
            for there, _, rows in location.runs(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, *rest, dtype=held.dtype)

    @functools.cached_property
    def tokenizer_arguments(self) -> dict[str, Any]:
        """The stored arguments with what tells the tokenizer: the folder that came along, and the rows there are."""
        beside = self.root / HF_FOLDER
        folder = self.hf_folder or (beside if beside.is_dir() else None)
        rows = self.pieces[EMBEDDING].shape[0]
        return {**self.arguments, "hf_folder": folder, "padded_vocab_size": rows}

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What the tokenizer's files say; None where they cannot be read."""
        return read_vocabulary(self.tokenizer_arguments)

    @functools.cached_property
    def tokens(self) -> dict[int, str] | None:
        """The token of each row that has one; None where the tokenizer's files cannot be read."""
        return None if self.vocabulary is None else self.vocabulary.below(self.pieces[EMBEDDING].shape[0])

    def token_rows(self, name: str) -> tuple[tuple[int, int], ...]:
        """The rows of an embedding or head that are tokens, in stretches from ``start`` to before ``stop``.

        All others are padding. Where no table is known, they are those that the configuration counts as vocabulary.
        """
        rows = self.pieces[name].shape[0]
        if self.tokens is None:
            return ((0, min(rows, self.arguments.get("vocab_size") or rows)),)
        return tuple(_stretches(number for number in sorted(self.tokens) if number < rows))

    @property
    def token_count(self) -> int:
        """How many rows of the embedding are tokens."""
        return sum(stop - start for start, stop in self.token_rows(EMBEDDING))


def _stretches(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as stretches from ``start`` to before ``stop``."""
    start = stop = -1
    for number in numbers:
        if number != stop:
            if start < stop:
                yield start, stop
            start = number
        stop = number + 1
    if start < stop:
        yield start, stop
