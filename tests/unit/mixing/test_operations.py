"""Operations: one object says what is done with tensors, does it and names it, and nothing else needs to know of it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from megatron_btx.mixing.api import mix
from megatron_btx.mixing.methods import METHODS, Chunk, Method
from megatron_btx.mixing.operations import Operation
from megatron_btx.mixing.plan import Plan, PlannedPiece
from tests.hugging_face import tensors
from tests.unit.mixing.folders import llama_folder


class Largest(Operation):
    """The largest of all sources' numbers."""

    name = "largest"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        """Number by number."""
        return torch.stack([source.read(planned.name, start, stop) for source in plan.sources]).amax(0)

    def reference(self, plan: Plan, planned: PlannedPiece, rows, numbers) -> torch.Tensor:
        """One after the other."""
        return functools.reduce(torch.maximum, numbers.values())

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        """In words."""
        return f"largest of {len(planned.parts)}"


def test_a_new_operation_needs_no_other_place(tmp_path: Path, monkeypatch):
    """Named by a row of the table, it is carried out, verified, printed, explained and recorded."""
    models = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate("ab")}

    def make(given, piece):
        return Largest(), tuple(Chunk(source, piece.name) for source in range(len(given.models)))

    monkeypatch.setitem(METHODS, "largest", Method("the largest numbers", make))
    result = mix(models, tmp_path / "out", method="largest", output_format="hf", verify=True)
    left, right, found = (tensors(tmp_path / name) for name in ("a", "b", "out"))
    assert all(torch.equal(found[key], torch.maximum(left[key], right[key])) for key in found)
    assert "largest of 2" in result.summary and "verified" not in result.summary
    assert {tensor["operation"] for tensor in result.manifest["tensors"].values()} == {"largest"}
