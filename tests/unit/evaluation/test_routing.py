"""Routing as numbers: shares, overlap, pieces of text, and earlier analyses that are drawn beside."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_btx.common.errors import InputError
from megatron_btx.common.shares import overlaps
from megatron_btx.evaluation.analyze_routing import pieces_of
from megatron_btx.evaluation.program import expert_names
from megatron_btx.evaluation.routing import (
    Routed,
    RoutingCounts,
    describe,
    describe_layers,
    divide_up,
    read_earlier,
)


def counted(*layers: list[float]) -> RoutingCounts:
    """By layer: choices, first choices, probabilities and gates of every expert; entropy, tokens, choices wanted."""
    counts = RoutingCounts.start(len(layers), (len(layers[0]) - 3) // 4, device="cpu")
    counts.buffer.copy_(torch.tensor(layers))
    return counts


def test_counts_of_a_router():
    """By hand: three tokens of two choices each in layer 1 of 2; the last token's are dropped, one of the second's."""
    router = SimpleNamespace(gating=lambda x_SBH: x_SBH, topk=2)
    even = torch.zeros(3, 1, 2)
    gates_TE = torch.tensor([[0.75, 0.25], [0.0, 0.5], [0.0, 0.0]])
    counts = RoutingCounts.start(2, 2, device="cpu")
    counts.add(1, router, even, (gates_TE, gates_TE > 0))
    assert not counts.buffer[0].any()
    assert counts.choices_LE[1].tolist() == [1.0, 2.0] and counts.first_LE[1].tolist() == [1.0, 1.0]
    assert counts.gates_LE[1].tolist() == [0.75, 0.75]
    assert counts.probabilities_LE[1].tolist() == pytest.approx([1.5, 1.5])
    assert counts.entropy_L[1].item() == pytest.approx(3 * math.log(2))
    assert (counts.tokens_L[1], counts.wanted_L[1]) == (3.0, 6.0)
    counts.buffer.mul_(2)  # what an all-reduce changes, all the sums see
    assert counts.tokens_L[1] == 6.0 and counts.first_LE[1].tolist() == [2.0, 2.0]


def test_shares():
    """By hand: 10 tokens, two choices each, of which three were dropped; a dense layer is left out."""
    found = describe_layers(counted([0.0] * 11, [17, 0, 9, 0, 7.5, 2.5, 6, 0, 5, 10, 20]))
    assert found["layers"] == [1]
    assert found["choices"] == [[1.0, 0.0]] and found["first"] == [[1.0, 0.0]]
    assert found["probabilities"] == [[0.75, 0.25]] and found["gates"] == [[0.6, 0.0]]
    assert found["entropy"] == [0.5] and found["dropped"] == [pytest.approx(0.15)]
    assert found["dead"] == [[1]]
    assert divide_up(torch.tensor([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0.0, 0.0], [0.25, 0.75]]


def test_dead_is_under_a_hundredth_of_even():
    """At four experts, 0.25 % of the choices."""
    for count, dead in ((2, [1]), (3, [])):
        choices = [1000.0 - count - 2.0 * 300, float(count), 300.0, 300.0]
        assert describe_layers(counted([*choices, *[0.0] * 13, 1000.0, 1000.0]))["dead"] == [dead]


def test_overlap():
    """One less the total variation distance, mean over layers."""
    shares = {
        "a": [[1.0, 0.0]] * 2,
        "b": [[0.0, 1.0]] * 2,
        "c": [[0.5, 0.5], [1.0, 0.0]],
        "d": [[0.25, 0.75], [1.0, 0.0]],
    }
    found = overlaps(shares)
    assert found["a"]["a"] == 1 and found["a"]["b"] == 0
    assert found["c"]["d"] == pytest.approx(0.875)


def test_tasks_of_a_domain_are_added_up():
    """By hand: two tasks of 10 and 30 tokens of one domain; a domain with one task is the task."""
    one = Routed(2.0, 10, counted([10, 0, 10, 0, 5, 5, 10, 0, 0, 10, 10]))
    three = Routed(4.0, 30, counted([0, 30, 0, 30, 15, 15, 0, 30, 0, 30, 30]))
    found = describe({"math/a": one, "code/x": one, "math/b": three})
    assert list(found) == ["math", "math/a", "code/x", "math/b"]
    assert found["math"]["choices"] == [[0.25, 0.75]] and found["math"]["tokens"] == 40 and found["math"]["loss"] == 3.5
    assert describe({"math": one, "math/a": one, "math/b": three})["math"]["tokens"] == 10
    choices = {label: numbers["choices"] for label, numbers in found.items()}
    assert overlaps(choices)["math/a"] == {"math": 0.25, "math/a": 1.0, "code/x": 1.0, "math/b": 0.0}


def test_experts_have_one_order():
    """The names of one mixture would be put on another's experts."""
    ours = {"btx_experts": ["a", "b"]}
    assert expert_names({"x": {}, "y": ours}, 2) == ["a", "b"]
    assert expert_names({"x": {}}, 2) == ["expert 0", "expert 1"] and expert_names({"x": {}}, None) is None
    with pytest.raises(InputError, match="^y: its experts are b, a, those of x a, b"):
        expert_names({"x": ours, "y": {"btx_experts": ["b", "a"]}}, 2)


class Bytes:
    """A tokenizer of bytes, whose characters may take several tokens."""

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_are_the_text():
    """A character of several tokens is shown by its last one."""
    text = "a ü</script>\n漢"
    pieces = pieces_of(list(text.encode()), Bytes())
    assert "".join(pieces) == text
    assert pieces[2:4] == ["", "ü"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("{}", "is no routing.json"),
        ('{"experts": ["a", "b"], "models": ["x"]}', "is no routing.json"),
        (
            '{"experts": ["a", "b"], "models": {"x": {"y": {"loss": 1, "layers": [0]}}}}',
            "is no routing.json.*choices",
        ),
        ('{"experts": ["x"], "models": {}}', "its experts are x, expected a, b"),
        ('{"experts": ["a", "b"], "models": {"btx": {}}}', "btx is there already"),
    ],
)
def test_earlier_analyses(content, said, tmp_path):
    """Drawn beside the new one only if they are of the same experts and other names."""
    if content is not None:
        (tmp_path / "routing.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_earlier([tmp_path / "routing.json"], ["btx"], ["a", "b"])
