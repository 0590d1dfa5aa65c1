"""Proof of a result: its files against their manifest; what was written against what the rules give, twice.

That what is stored is what :meth:`Operation.rows` gives proves bytes and places, and cannot see a wrong rule. So rows
of every stretch are compared with :meth:`Operation.reference`, too, which gets there by another road.

Every row of the vocabulary is looked at by its token: the tokenizer that was *written* tells the token of each row,
every source's tokenizer tells where that token is in the source, and of the rows there the reference must make what is
stored, wherever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.stored import Reader
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.manifest import FILE_NAME
from megatron_btx.mixing.compute import rows_of
from megatron_btx.mixing.layout import Fill, Task
from megatron_btx.mixing.loader import stretches_of
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.result_manifest import (
    Progress,
    describe_frame,
    hash_stretch,
    own_hash,
    read_result_manifest,
    stretches_by_file,
)
from megatron_btx.mixing.writers import Output
from megatron_btx.tokenizers.vocabulary import HF_FOLDER, read_vocabulary

if TYPE_CHECKING:
    import torch

_SAMPLED_ROWS = 8
"""Of each stretch of rows that a block holds, so many are compared with the reference."""
_ROWS = 1024
_SUM_EPS = 2.0**-48
"""Of the largest number: more than a sum of sixteen in fp64 is off by, and far below any stored dtype's rounding."""
_DAMAGED = (KeyError, TypeError, AttributeError, ValueError, OverflowError)


def carries_manifest(root: Path, folder: Path) -> bool:
    """Whether a folder has a manifest that :func:`check_manifest` can check: of what is read from ``folder`` in it.

    Training that goes on in the folder of a result adds iterations of its own, which no manifest describes.
    """
    manifest = read_result_manifest(root)
    if manifest is None:
        return False
    name, files = str(folder.relative_to(root)), manifest.get("files")
    honest = isinstance(files, dict) and own_hash(manifest) == manifest.get("manifest_sha256")
    return not honest or name == "." or any(file.startswith(f"{name}/") for file in manifest["files"])


def manifest_bytes(folder: Path) -> int:
    """How many bytes :func:`check_manifest` reads of what is there."""
    if read_result_manifest(folder) is None:
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_manifest(folder: Path, progress: Progress = lambda done_bytes: None) -> int:
    """Compare every byte of a result with its manifest; returns the number of tensors.

    Raises:
        CheckpointError: no manifest, or names the tensor or file that differs.
    """
    remedy = "make it again"
    manifest = read_result_manifest(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give that of a result")
    if manifest is None:
        raise CheckpointError(f"{folder}: has no {FILE_NAME} with hashes of its tensors, so it cannot be checked")
    try:
        if own_hash(manifest) != manifest["manifest_sha256"]:
            raise CheckpointError(f"{folder / FILE_NAME}: was changed after it was written; {remedy}")
        named = {FILE_NAME, *manifest["files"]}
        for file in sorted(folder.rglob("*")):  # one more can change what is read: an index, a tokenizer, a common.pt
            if str(file.relative_to(folder)) not in named and (file.is_symlink() or not file.is_dir()):
                raise CheckpointError(
                    f"{file}: was not written with the rest, {FILE_NAME} does not name it; move it away"
                )
        stretches = stretches_by_file(manifest)
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file}: is named in {FILE_NAME} and does not exist; {remedy}")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {entry['bytes']} were written; {remedy}")
            if describe_frame(file, stretches.get(name, [])) != entry:
                raise CheckpointError(f"{file}: differs from what was written, outside of its tensors; {remedy}")
            for stretch in stretches.get(name, []):
                if hash_stretch(file, stretch.position, stretch.length, progress) != stretch.sha256:
                    raise CheckpointError(f"{file}: {stretch.tensor}: differs from what was written; {remedy}")
        return len(manifest["tensors"])
    except _DAMAGED as error:
        raise CheckpointError(f"{folder / FILE_NAME}: is damaged ({error!r}); {remedy}") from error


def check_against_sources(plan: Plan, output: Output, folder: Path) -> Callable[[Task, Progress], None]:
    """Open a written result; returns the check of one task: all its numbers against what the rules give.

    Raises:
        CheckpointError: from here: the result has other tensors than planned; from the check: names what differs.
    """
    import torch

    reader = output.reader(folder)
    planned = {tensor.name for tensor in output.tensors}
    if planned != set(reader.tensors):
        odd = sorted(planned ^ set(reader.tensors))[0]
        raise CheckpointError(f"{folder}: {odd}: planned and stored tensors differ; convert again")

    def check(task: Task, progress: Progress) -> None:
        block = task.block
        # The fills follow each other along the first axis after the leading ones.
        axis = len(block.sizes) - len(block.fills[0].planned.shape)
        row = block.offsets[axis]
        for fill in block.fills:
            first = fill.start
            for rows in rows_of(plan, fill.planned, fill.start, fill.stop):
                offsets = (*block.offsets[:axis], row, *block.offsets[axis + 1 :])
                sizes = (*block.sizes[:axis], rows.shape[0], *block.sizes[axis + 1 :])
                found = reader.read(block.tensor, offsets, sizes)
                if not torch.equal(found.reshape(-1).view(torch.uint8), rows.reshape(-1).view(torch.uint8)):
                    raise CheckpointError(
                        f"{folder}: {block.tensor} at {list(offsets)} differs from its sources; convert again"
                    )
                where = f"{folder}: {block.tensor} at {list(offsets)}"
                _check_by_reference(plan, fill, first, rows, where)
                first += rows.shape[0]
                row += rows.shape[0]
                progress(rows.numel() * rows.element_size())

    return check


def _check_by_reference(plan: Plan, fill: Fill, start: int, found: torch.Tensor, where: str) -> None:
    """Compare some rows of a stretch, where they are among those from ``start`` on, with what the operation says."""
    planned = fill.planned
    stop = min(fill.stop, planned.source_rows)  # no source has the new ones
    for row in range(fill.start, stop, max(1, -(-(stop - fill.start) // _SAMPLED_ROWS))):
        if not start <= row < start + found.shape[0]:
            continue
        numbers = planned.operation.numbers(plan, planned, row)
        expected = planned.operation.reference(plan, planned, [row], numbers).to(planned.dtype)
        if first_unequal(found[row - start : row - start + 1], expected, numbers.values()) is not None:
            raise CheckpointError(
                f"{where}: row {row} of {planned.name} is not what its {planned.operation.name} has to be, computed "
                "another way; this is a defect of the converter, please report it"
            )


# --- rows of tokens ----------------------------------------------------------------------------------------------


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
    stored: dict[str, Any] = {"hf_folder": folder}
    if isinstance(reader, TorchDistReader):
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
