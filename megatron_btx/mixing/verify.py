"""Proof of a result: its files against their manifest; what was written against what the rules give, twice.

That what is stored is what :meth:`Operation.rows` gives proves bytes and places, and cannot see a wrong rule. So rows
of every stretch are compared with :meth:`Operation.reference`, too, which gets there by another road.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.manifest import FILE_NAME
from megatron_btx.mixing.compute import rows_of
from megatron_btx.mixing.layout import Fill, Task
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.result_manifest import (
    Progress,
    describe_frame,
    hash_stretch,
    own_hash,
    read_result_manifest,
    stretches_by_file,
)
from megatron_btx.mixing.verify_vocab import first_unequal
from megatron_btx.mixing.writers import Output

if TYPE_CHECKING:
    import torch

_SAMPLED_ROWS = 8
"""Of each stretch of rows that a block holds, so many are compared with the reference."""
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
