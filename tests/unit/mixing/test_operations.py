"""Operations: one object says what is done with tensors, does it and names it, and nothing else needs to know of it."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from megatron_btx.checkpoint.pieces import Piece
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.api import mix
from megatron_btx.mixing.methods import METHODS, Chunk, Experts, Given, Method, dense_name
from megatron_btx.mixing.operations import AVERAGE, MOVE, NEW_ROUTERS, Operation
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.verify import first_unequal
from tests.support.hugging_face import tensors
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


class Grow(Operation):
    """The rows there are, and one more: their mean."""

    name = "grow"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        """Of all rows, those asked for."""
        (part,) = planned.parts
        held = plan.sources[part.source].read(part.piece, 0, part.stop)
        return torch.cat([held, held.mean(0, keepdim=True)])[start:stop]

    def numbers(self, plan: Plan, planned: PlannedPiece, row: int) -> dict[Part, torch.Tensor]:
        """All of a source's."""
        (part,) = planned.parts
        return {part: plan.sources[part.source].read(part.piece, 0, part.stop).double()}

    def reference(self, plan: Plan, planned: PlannedPiece, rows, numbers) -> torch.Tensor:
        """Row by row."""
        (held,) = numbers.values()
        return torch.stack([held[row] if row < len(held) else held.sum(0) / len(held) for row in rows])

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        """In words."""
        return "one row more"


def make_joined(given: Given, piece: Piece):
    """A mixture's own pieces, a dense model's blocks as the last expert, and a row of routers for it."""
    if piece.numbers.get("expert") == len(given.models[0].experts):
        return MOVE, (Chunk(1, dense_name(piece)),)
    if ".router." in piece.name:
        return Grow(), (Chunk(0, piece.name),)
    return MOVE, (Chunk(0, piece.name),)


JOIN = Method(
    "a mixture, and a dense model as one more expert",
    make_joined,
    lambda given: Experts((*given.models[0].experts, given.models[1].name)),
    takes=("mixture", "dense"),
    at_most=2,
    averages=False,
)


def make_swapped(given: Given, piece: Piece):
    """The second expert of a mixture where the first stood."""
    if "expert" in piece.numbers:
        name = piece.name.replace(f"experts.{piece.numbers['expert']}.", f"experts.{1 - piece.numbers['expert']}.")
        return MOVE, (Chunk(0, name),)
    return MOVE, (Chunk(0, piece.name),)


SWAP = Method("a mixture of two in the other order", make_swapped, takes=("mixture",), at_least=1, averages=False)


@pytest.mark.parametrize("form", ["megatron", "hf"])
def test_a_part_may_be_any_expert_of_a_mixture(form: str, tmp_path: Path, monkeypatch):
    """A mixture grows by a dense model, and its experts change places: rows of the table, and nothing else."""
    models = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate("abc")}
    monkeypatch.setitem(METHODS, "join", JOIN)
    monkeypatch.setitem(METHODS, "swap", SWAP)
    mix({name: models[name] for name in "ab"}, tmp_path / "ab", output_format=form)
    abc = mix({"ab": tmp_path / "ab", "c": models["c"]}, tmp_path / "abc", method="join", verify=True)
    mix({"abc": tmp_path / "abc"}, tmp_path / "hf", method="copy", output_format="hf")
    found, names = tensors(tmp_path / "hf"), {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for number, name in enumerate("abc"):
        dense = tensors(models[name])
        for layer, (theirs, ours) in itertools.product((0, 1), names.items()):
            prefix = f"model.layers.{layer}."
            expert = found[f"{prefix}block_sparse_moe.experts.{number}.{theirs}.weight"]
            assert torch.equal(expert, dense[f"{prefix}mlp.{ours}.weight"])
    router = found["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(router[2], router[:2].mean(0)) and abc.manifest["method"] == "join"
    mix({"ab": tmp_path / "ab"}, tmp_path / "ba", method="swap", output_format="hf", verify=True)
    swapped, key = tensors(tmp_path / "ba"), "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    assert torch.equal(swapped[key.format(0)], found[key.format(1)])
    with pytest.raises(InputError, match=r"b \(.*\): has no routers|a \(.*\): has no routers, expected a mixture"):
        mix({name: models[name] for name in "ab"}, tmp_path / "no", method="join")


@pytest.mark.parametrize("operation", [MOVE, AVERAGE, NEW_ROUTERS], ids=lambda operation: operation.name)
def test_a_wrong_rule_is_found_by_its_other_road(operation, tmp_path, monkeypatch):
    """Comparing a result with the rule that made it could not see this."""
    models = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate("ab")}
    right = type(operation).rows

    def wrong(self, plan, planned, start, stop):
        return right(self, plan, planned, start, stop) * 1.01

    monkeypatch.setattr(type(operation), "rows", wrong)
    mix(models, tmp_path / "unseen")
    with pytest.raises(InputError, match=f"not what its {operation.name} has to be|is not the {operation.name} of"):
        mix(models, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_numbers_that_cancel_are_their_sums_rounding():
    """Of a mean that is zero but for the order of its sum nothing is left to compare relatively."""
    numbers = [torch.tensor([[number]], dtype=torch.float64) for number in (0.1, 0.2, -0.3)]
    one, other = sum(numbers), sum(reversed(numbers))
    assert not torch.equal(one, other) and first_unequal(one.float(), other.float(), numbers) is None
    assert first_unequal(one.float() + 1e-6, other.float(), numbers) == 0
