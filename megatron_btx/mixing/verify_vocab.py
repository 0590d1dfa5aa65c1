"""The vocabulary's rows of a written result, checked by another road than the one that made them.

Every row is looked at by its token: the tokenizer that was *written* tells the token of each row, every source's
tokenizer tells where that token is in the source, and of the rows there the operation's own reference must make what is
stored, wherever they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.safetensors import SafetensorsReader
from megatron_btx.checkpoint.stored import Reader
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.loader import stretches_of
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.writers import Output
from megatron_btx.tokenizers.vocabulary import HF_FOLDER, read_vocabulary

if TYPE_CHECKING:
    import torch

_ROWS = 1024
_SUM_EPS = 2.0**-48
"""Of the largest number: more than a sum of sixteen in fp64 is off by, and far below any stored dtype's rounding."""


def check_token_rows(plan: Plan, output: Output, folder: Path) -> str:
    """Compare every row of embedding and head with the rows of its token; returns what was checked, in words.

    Where a tokenizer is not known, or the user does not want them compared, there is nothing to look rows up by.

    Raises:
        CheckpointError: names the token whose row is not made of the rows of the models that know it, or that has none.
    """
    unlooked = "the vocabulary's rows were not looked up by token"
    if plan.request.allow_other_tokenizer:
        return f"{unlooked}: --allow-other-tokenizer"
    for source in plan.sources:
        if source.tokenizer.tokens is None:
            return f"{unlooked}: the tokenizer of {source.name} is not known"
    reader = output.reader(folder)
    written = _written_tokens(reader, folder)
    if written is None:
        raise CheckpointError(f"{folder}: the tokenizer that was written cannot be read; convert again")
    for source in plan.sources:
        for number, token in (source.tokenizer.tokens or {}).items():
            if written.get(number) != token:
                raise CheckpointError(
                    f"{folder}: the tokenizer that was written says token {number} is {written.get(number)!r}, it is "
                    f"{token!r} in {source.name}; convert again"
                )
    for tensor in output.tensors:
        planned = tensor.blocks[0].fills[0].planned
        if planned.has_token_rows:
            _check_tensor(plan, planned, reader, tensor.name, written)
    if len(plan.sources) == 1:
        return f"all rows of {len(written)} tokens are the model's own"
    return f"all rows of {len(written)} tokens are what the models that know the token give"


def _written_tokens(reader: Reader, folder: Path) -> Mapping[int, str] | None:
    """The table of the result's own files."""
    if isinstance(reader, SafetensorsReader):
        stored: dict[str, Any] = {"hf_folder": folder}
    else:
        assert isinstance(reader, TorchDistReader)
        stored = reader.arguments() | {"hf_folder": None}
        if (folder / HF_FOLDER).is_dir():
            stored["hf_folder"] = folder / HF_FOLDER
    vocabulary = read_vocabulary(stored)
    if vocabulary is None:
        return None
    return vocabulary.tokens


def _check_tensor(plan: Plan, planned: PlannedPiece, reader: Reader, name: str, written: Mapping[int, str]) -> None:
    import torch

    places = {}
    for part in planned.parts:
        source = plan.sources[part.source]
        rows, tokens = source.pieces[part.piece].shape[0], source.tokenizer.tokens or {}
        places[part] = {token: number for number, token in tokens.items() if number < rows}
    rest = planned.shape[1:]
    had = planned.source_rows
    total, count = torch.zeros(rest, dtype=torch.float64), 0

    def read(start: int, stop: int) -> torch.Tensor:
        return reader.read(name, (start, *(0,) * len(rest)), (stop - start, *rest))

    for low in range(0, had, _ROWS):
        for owners, numbers in _by_owners(places, written, range(low, min(low + _ROWS, had))).items():
            found = torch.cat([read(*stretch) for stretch in stretches_of(numbers)])
            held = {}
            for part in owners:
                source = plan.sources[part.source]
                there = stretches_of(places[part][written[number]] for number in numbers)
                held[part] = torch.cat([source.read(part.piece, *stretch) for stretch in there]).double()
            expected = planned.operation.reference(plan, planned, numbers, held)
            wrong = first_unequal(found, expected.to(planned.dtype), held.values())
            if wrong is not None:
                number = numbers[wrong]
                raise CheckpointError(
                    f"{name}: row {number} ({written[number]!r}) is not the {planned.operation.name} of the models "
                    "that know this token; this is a defect of the converter, please report it"
                )
            total += found.sum(0, dtype=torch.float64)
            count += len(numbers)
    if planned.new_rows and count:
        new = read(had, planned.shape[0])
        if first_unequal(new, (total / count).to(planned.dtype).expand_as(new)) is not None:
            raise CheckpointError(f"{name}: rows from {had} on are not the mean of the tokens' rows; convert again")


def _by_owners(
    places: Mapping[Part, Mapping[str, int]], written: Mapping[int, str], rows: Iterable[int]
) -> dict[tuple[Part, ...], list[int]]:
    """The rows of tokens, by the parts that know the token; those that nobody knows are left out."""
    found: dict[tuple[Part, ...], list[int]] = {}
    for row in rows:
        owners = tuple(part for part, place in places.items() if written.get(row) in place)
        if owners:
            found.setdefault(owners, []).append(row)
    return found


def first_unequal(found: torch.Tensor, expected: torch.Tensor, numbers: Iterable[torch.Tensor] = ()) -> int | None:
    """The first row that differs by more than one rounding: this sum has another order, a wrong mean is far off.

    Args:
        numbers: in fp64, what both were computed from: where they cancel, what is left is their sum's own rounding.
    """
    import torch

    unit = torch.finfo(found.dtype)
    largest = max((float(part.abs().max()) for part in numbers if part.numel()), default=0.0)
    slack = expected.double().abs() * unit.eps + unit.tiny + largest * _SUM_EPS
    close = (found.double() - expected.double()).abs() <= slack
    same = close | (found == expected) | (found.isnan() & expected.isnan())
    wrong = ~same.reshape(len(same), -1).all(dim=1)
    if not bool(wrong.any()):
        return None
    return int(torch.nonzero(wrong)[0])
