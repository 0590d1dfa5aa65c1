"""Loading the models of a mix: which format a path holds, what its arguments say, and the pieces that it has."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint import nemo, safetensors
from megatron_btx.checkpoint import unsupported as kinds
from megatron_btx.checkpoint.huggingface import config as hf_config
from megatron_btx.checkpoint.huggingface import families as hf_families
from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.huggingface.foreign_names import unwrap_names
from megatron_btx.checkpoint.iterations import is_checkpoint, resolve_iteration, root_of
from megatron_btx.checkpoint.names import DIALECTS, IGNORED_HF, IGNORED_MEGATRON, REFUSED_MEGATRON, Dialect
from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.pieces import Location, Piece, pieces_of
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.stored import Reader
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError
from megatron_btx.tokenizers.vocabulary import HF_FOLDER, TOKENIZER_FILES, ModelTokenizer, locate_tokenizer

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "embedding.weight", "head.weight"
_HEAD_ROWS = 1024
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_OTHER_SIZES = (
    "num_query_groups", "kv_channels", "padded_vocab_size", "vocab_size", "max_position_embeddings", "num_experts",
    "moe_ffn_hidden_size",
)  # fmt: skip
_LAYERS_AT_MOST = 10_000


@dataclasses.dataclass(frozen=True)
class Held:
    """A piece that a source holds: what it is, where it lies, and as what."""

    piece: Piece
    location: Location
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Source:
    """One model to be mixed or converted.

    Raises:
        CheckpointError: from the constructor: a tensor is missing, too much, or of another shape than the model's
            configuration says.
    """

    name: str
    root: Path
    reader: Reader
    arguments: Mapping[str, Any]
    dialect: Dialect
    sizes: Sizes
    config: Mapping[str, Any] | None = None
    """Its config.json, of a Hugging Face model folder."""
    pieces: dict[str, Held] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        where = f"{self.name} ({self.folder})"
        unused = set(self.reader.tensors)
        if self.config is not None:
            unused -= shared_expert.names_without_effect(self.reader, self.config, self.sizes, where)
        tied = not self.arguments.get("untie_embeddings_and_output_weights")
        for piece in pieces_of(self.sizes):
            locations = list(piece.locations(self.dialect, self.sizes))
            found = [self._held(piece, place, where) for place in locations if place.key in self.reader.tensors]
            unused.difference_update(place.key for place in locations)
            # Some save the head of tied models too, or a norm under both its names: what is used must be all there is.
            original, why = EMBEDDING, "though the configuration ties the two"
            if not (tied and piece.name == HEAD):
                original, why = piece.name, "though the two are one part of the model"
                if found:
                    self.pieces[piece.name] = found.pop(0)
                elif piece.required:
                    key = next((place.key for place in locations), piece.name)
                    raise CheckpointError(
                        f"{where}: {key} is missing; its configuration asks for it, so it is incomplete"
                    )
            for copy in found:
                if not self._are_equal(copy, self.pieces[original]):
                    raise CheckpointError(
                        f"{where}: {copy.location.key} is stored and is not {self.pieces[original].location.key}, "
                        f"{why}; say which is meant: correct the configuration, or leave {copy.location.key} out"
                    )
        self._refuse_unknown(unused, where)

    @property
    def folder(self) -> Path:
        """Where the tensors lie."""
        return self.reader.folder

    @property
    def is_hugging_face(self) -> bool:
        """Whether the source is a Hugging Face model folder."""
        return isinstance(self.reader, safetensors.SafetensorsReader)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of a mixture's experts, in order: those that its mix gave them, else their numbers."""
        names = self.arguments.get("btx_experts")
        if isinstance(names, list | tuple) and len(names) == self.sizes.experts:
            return tuple(map(str, names))
        return tuple(map(str, range(self.sizes.experts)))

    @property
    def hf_folder(self) -> Path | None:
        """The folder with Hugging Face's configuration and tokenizer files, where there is one."""
        if self.is_hugging_face:
            return self.folder
        # Training that started from a result goes on in another folder, with the tokenizer where it was.
        places = [self.root / HF_FOLDER]
        tokenizer = self.arguments.get("tokenizer_model")
        if tokenizer:
            places.append(Path(tokenizer))
        for place in places:
            if (place / safetensors.CONFIG).is_file():
                return place
        return None

    def _refuse_unknown(self, unused: set[str], where: str) -> None:
        ignored: tuple[str, ...] = IGNORED_MEGATRON
        if self.is_hugging_face:
            ignored = IGNORED_HF
        for key in sorted(unused):
            for pattern, reason in REFUSED_MEGATRON.items():
                if re.fullmatch(pattern, key):
                    raise CheckpointError(f"{where}: {key}: {reason}")
            if not any(re.fullmatch(pattern, key) for pattern in ignored):
                raise CheckpointError(
                    f"{where}: {key} is no tensor of the model that its configuration describes; correct the "
                    "configuration if it says too little; else this architecture is not supported"
                )

    def _are_equal(self, left: Held, right: Held) -> bool:
        import torch

        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        rows = left.shape[0]
        for start in range(0, rows, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, rows)
            if not torch.equal(self._rows(left, start, stop), self._rows(right, start, stop)):
                return False
        return True

    def _held(self, piece: Piece, location: Location, where: str) -> Held:
        stored = self.reader.tensors[location.key]
        shape = piece.shape
        if piece.shape[0] == -1:  # as many rows as there are: embedding and head
            rows = -1
            if len(stored.shape) > len(location.lead):
                rows = stored.shape[len(location.lead)]
            shape = (rows, *piece.shape[1:])
            location = dataclasses.replace(location, unit=rows)
        extents = {"layer": self.sizes.layers, "expert": self.sizes.experts}
        leading = [extents[axis] for axis in self.dialect.axes if axis in piece.numbers]  # as the dialect stacks them
        expected = (*leading, location.stored_rows, *shape[1:])
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

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a piece, in the dtype stored."""
        return self._rows(self.pieces[name], start, stop)

    def _rows(self, held: Held, start: int, stop: int) -> torch.Tensor:
        import torch

        location, rest = held.location, held.shape[1:]
        one, zero = (1,) * len(location.lead), (0,) * len(rest)
        parts = []
        for stored_row, _, rows in location.runs(start, stop):
            part = self.reader.read(location.key, (*location.lead, stored_row, *zero), (*one, rows, *rest))
            parts.append(part.view(rows, *rest))
        if not parts:
            return torch.empty(0, *rest, dtype=held.dtype)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    @functools.cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer that came along, and the rows there are."""
        folder = self.hf_folder
        if folder is None and (self.root / HF_FOLDER).is_dir():
            folder = self.root / HF_FOLDER
        rows = self.pieces[EMBEDDING].shape[0]
        return ModelTokenizer(self.name, {**self.arguments, "hf_folder": folder, "padded_vocab_size": rows})

    def token_rows(self, name: str) -> tuple[tuple[int, int], ...]:
        """The rows of an embedding or head that are tokens, in stretches from ``start`` to before ``stop``.

        All others are padding. Where no table is known, they are those that the configuration counts as vocabulary.
        """
        rows = self.pieces[name].shape[0]
        tokens = self.tokenizer.tokens
        if tokens is None:
            return ((0, min(rows, self.arguments.get("vocab_size") or rows)),)
        return tuple(stretches_of(number for number in sorted(tokens) if number < rows))

    @property
    def token_count(self) -> int:
        """How many rows of the embedding are tokens."""
        return sum(stop - start for start, stop in self.token_rows(EMBEDDING))


def stretches_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers that follow each other as stretches from ``start`` to before ``stop``."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


# --- opening one -----------------------------------------------------------------------------------------------


def _sizes(name: str, folder: Path, arguments: Mapping[str, Any]) -> Sizes:
    """The sizes that stored arguments say; refused where one is missing, of another type, or impossible."""
    where = f"{name} ({folder})"
    for argument in (*_SIZES, *_OTHER_SIZES):
        value = arguments.get(argument)
        if value is None and argument in _OTHER_SIZES:
            continue
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                f"{where}: its stored arguments say {argument} = {value!r}, expected a positive number"
            )
    _check_layers(arguments["num_layers"], where)
    for argument in TOKENIZER_FILES:
        if not isinstance(arguments.get(argument), str | Path | None):
            raise CheckpointError(f"{where}: its stored arguments say {argument} = {arguments[argument]!r}, no path")
    frequency = arguments.get("moe_layer_freq", 1)
    numbers = frequency if isinstance(frequency, list | tuple) else [frequency]
    if not numbers or any(type(number) is not int for number in numbers):
        raise CheckpointError(f"{where}: its stored arguments say moe_layer_freq = {frequency!r}, expected numbers")
    sizes = Sizes.of(arguments)
    if sizes.heads % sizes.groups or len(sizes.mixture_layers) != sizes.layers:
        raise CheckpointError(
            f"{where}: its stored arguments say {sizes.heads} heads in {sizes.groups} query groups, and moe_layer_freq "
            f"= {arguments.get('moe_layer_freq')!r} for {sizes.layers} layers, which is impossible"
        )
    return sizes


def _check_layers(layers: object, where: str) -> None:
    """Much is counted per layer: a slip of the keyboard would take all memory before anything else could refuse it."""
    if isinstance(layers, int) and layers > _LAYERS_AT_MOST:
        raise CheckpointError(f"{where}: its configuration says {layers} layers, expected {_LAYERS_AT_MOST} at most")


def open_source(name: str, path: str | Path) -> Source:
    """Open a Megatron checkpoint (its root, or one iteration) or a Hugging Face model folder.

    Raises:
        CheckpointError: it cannot be read, or is of a form that is not supported; says what to do.
    """
    path = nemo.weights_folder(model_path(path))
    if path.is_dir() and (safetensors.is_model_folder(path) or not is_checkpoint(path)):
        kinds.check_kind(path)
    if path.is_dir() and safetensors.is_model_folder(path):
        return _open_folder(name, path)
    if not is_checkpoint(path):
        safetensors.refuse_without_config(path)
    return _open_checkpoint(name, resolve_iteration(path))


def _open_folder(name: str, folder: Path) -> Source:
    where = f"{name} ({folder / safetensors.CONFIG})"
    config = safetensors.read_json(folder / safetensors.CONFIG)
    _check_layers(config.get("num_hidden_layers"), where)
    arguments = hf_config.arguments_from_config(config, where)
    reader = safetensors.SafetensorsReader(folder)
    reader.tensors = unwrap_names(reader.tensors, f"{name} ({folder})")
    family = hf_families.family_of(config, where)
    arguments |= hf_config.dtype_arguments(config, where, reader.dtypes())
    dialect = DIALECTS[family.dialect]
    if any(key.endswith(".mlp.experts.gate_up_proj") for key in reader.tensors):
        dialect = DIALECTS["fused_moe"]
    return Source(name, folder, reader, arguments, dialect, _sizes(name, folder, arguments), config)


def _open_checkpoint(name: str, folder: Path) -> Source:
    reader = TorchDistReader(folder)
    root = root_of(folder)
    kinds.refuse_placeholders(root / HF_FOLDER)
    arguments = locate_tokenizer(_arguments_of(reader, f"{name} ({folder})"), root)
    sizes = _sizes(name, folder, arguments)
    return Source(name, root, reader, arguments, _megatron_dialect(reader.tensors), sizes)


def _arguments_of(reader: TorchDistReader, where: str) -> dict[str, Any]:
    """The stored arguments, else those that Megatron-Bridge or NeMo 2 describe; names lose NeMo's ``module.``."""
    model = {}
    for key in reader.tensors:
        if not any(re.fullmatch(pattern, key) for pattern in IGNORED_MEGATRON):
            model[key] = key
    renamed = {old: new for new, old in unwrap_names(model, where).items()}
    reader.tensors = {renamed.get(key, key): stored for key, stored in reader.tensors.items()}
    description = nemo.description_of(reader.folder)
    if description is None or reader.has_arguments():
        return reader.arguments()
    embedding = reader.tensors.get("embedding.word_embeddings.weight")
    rows = 0
    if embedding is not None and embedding.shape:
        rows = embedding.shape[0]
    return nemo.read_arguments(description, rows)


def _megatron_dialect(keys: Iterable[str]) -> Dialect:
    """Recognised from the keys, never guessed from a version."""
    dialect = DIALECTS["stacked"]
    for key in keys:
        if re.fullmatch(r"decoder\.layers\.\d+\..*(\.weight_w|\.experts\.experts\.\d+\..*)", key):
            return DIALECTS["singleton"]
        if re.match(r"decoder\.layers\.\d+\.", key):
            dialect = DIALECTS["numbered"]
    return dialect
