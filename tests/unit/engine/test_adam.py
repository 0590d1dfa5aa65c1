"""GroupStepAdam is torch's Adam and AdamW, with one step per parameter group."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from megatron_btx.common.errors import InputError
from megatron_btx.engine.optimizer import GroupStepAdam

STEPS = 20
SETTINGS = {
    "plain": {"lr": 1e-2, "weight_decay": 0.0},
    "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-5},
    "strong decay": {"lr": 0.3, "weight_decay": 0.5, "betas": (0.5, 0.999)},
}
KINDS = {"adamw": (True, torch.optim.AdamW), "adam": (False, torch.optim.Adam)}


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (13,), (3, 4, 2), (1,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def groups(values: list[torch.nn.Parameter], settings: dict) -> list[dict]:
    """Two groups with other learning rates and decay, as Megatron makes them."""
    return [
        {"params": values[:2], **settings},
        {"params": values[2:], **settings, "lr": settings["lr"] / 3, "weight_decay": 0.0},
    ]


def give_gradients(step: int, *sides: list[torch.nn.Parameter], frozen: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for place in range(len(sides[0])):
        gradient = torch.randn(sides[0][place].shape, generator=generator)
        for side in sides:
            side[place].grad = None if place == frozen else gradient.to(side[place].dtype).clone()


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("frozen", [None, 1])
def test_equals_torch(kind, settings, frozen, monkeypatch):
    """Twenty steps, two groups, a learning rate that changes, a parameter that never gets a gradient: same numbers."""
    decoupled, reference = KINDS[kind]
    ours, theirs = parameters(), parameters()
    mine = GroupStepAdam(groups(ours, SETTINGS[settings]), adam_w_mode=decoupled)
    stock = reference(groups(theirs, SETTINGS[settings]), fused=True)
    for step in range(STEPS):
        give_gradients(step, ours, theirs, frozen=frozen)
        for optimizer in (mine, stock):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    if frozen is not None:
        assert torch.equal(ours[frozen], parameters()[frozen])
        assert not mine.state.get(ours[frozen])
    assert not torch.equal(ours[0], parameters()[0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_the_formula(kind):
    """Against torch's plain implementation as well, not only against the same kernel."""
    decoupled, reference = KINDS[kind]
    ours, theirs = parameters(), parameters()
    mine = GroupStepAdam(groups(ours, SETTINGS["decay"]), adam_w_mode=decoupled)
    stock = reference(groups(theirs, SETTINGS["decay"]), fused=False, foreach=False)
    for step in range(STEPS):
        give_gradients(step, ours, theirs)
        mine.step()
        stock.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("saved_after", [1, 7])
def test_a_round_trip_of_its_state(saved_after):
    """Saved, loaded into a new optimizer and continued: the same bits as without the interruption."""
    straight, first = parameters(), parameters()
    whole = GroupStepAdam(groups(straight, SETTINGS["decay"]))
    half = GroupStepAdam(groups(first, SETTINGS["decay"]))
    for step in range(saved_after):
        give_gradients(step, straight, first)
        whole.step()
        half.step()
    file = io.BytesIO()
    torch.save({"model": first, "optimizer": half.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    second = [torch.nn.Parameter(value.detach().clone()) for value in stored["model"]]
    resumed = GroupStepAdam(groups(second, {"lr": 7.0, "weight_decay": 7.0}))
    resumed.load_state_dict(copy.deepcopy(stored["optimizer"]))
    assert [group["step"] for group in resumed.param_groups] == [saved_after, saved_after]
    for step in range(saved_after, STEPS):
        give_gradients(step, straight, second)
        whole.step()
        resumed.step()
    for a, b in zip(straight, second, strict=True):
        assert torch.equal(a, b)


def test_the_form_that_megatron_expects():
    """One integer step per group, the two moments and nothing else per parameter; none for an empty group."""
    values = parameters()
    optimizer = GroupStepAdam([{"params": values}, {"params": []}])
    give_gradients(0, values)
    optimizer.step()
    state = optimizer.state_dict()
    assert [group.get("step") for group in state["param_groups"]] == [1, None]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())
    assert type(state["param_groups"][0]["step"]) is int


def test_steps_are_not_shared():
    """Every parameter's bias correction sees the same step, however many parameters a group has."""
    one, many = [torch.nn.Parameter(torch.ones(3))], [torch.nn.Parameter(torch.ones(3)) for _ in range(9)]
    alone, together = GroupStepAdam(one, lr=0.1), GroupStepAdam(many, lr=0.1)
    for step in range(5):
        for value in (*one, *many):
            value.grad = torch.full((3,), 0.5 + step)
        alone.step()
        together.step()
    assert all(torch.equal(value, one[0]) for value in many)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"capturable": True}, "--optimizer-cuda-graph"), ({"exp_avg_dtype": torch.bfloat16}, "exp_avg_dtype")],
)
def test_what_only_the_fused_packages_have(settings, named):
    with pytest.raises(InputError, match=f"{named}.*Transformer Engine"):
        GroupStepAdam(parameters(), **settings)
