"""Routing as numbers and as a page: shares, overlap, pieces of text, and a page that hostile text cannot break."""

from __future__ import annotations

import json
import re

import pytest

from megatron_btx.evaluation.inputs import expert_names
from megatron_btx.evaluation.routing import Routed, described, overlap, overlaps, pieces_of, read_earlier, shares
from megatron_btx.ground.errors import InputError
from megatron_btx.report.routing_page import write_page


def test_shares():
    """By hand: 10 tokens, two choices each, of which three were dropped; a dense layer is left out."""
    #           choices  first   probabilities gates     entropy tokens wanted
    mixture = [17.0, 0.0, 9.0, 0.0, 7.5, 2.5, 6.0, 0.0, 5.0, 10.0, 20.0]
    found = shares([[0.0] * 11, mixture], 2)
    assert found["layers"] == [1]
    assert found["choices"] == [[1.0, 0.0]] and found["first"] == [[1.0, 0.0]]
    assert found["probabilities"] == [[0.75, 0.25]] and found["gates"] == [[0.6, 0.0]]
    assert found["entropy"] == [0.5] and found["dropped"] == [pytest.approx(0.15)]
    assert found["dead"] == [[1]]


def test_dead_is_under_a_hundredth_of_even():
    """At four experts, 0.25 % of the choices."""
    for count, dead in ((2, [1]), (3, [])):
        row = [1000.0 - count - 2.0 * 300, float(count), 300.0, 300.0, *[0.0] * 12, 0.0, 1000.0, 1000.0]
        assert shares([row], 4)["dead"] == [dead]


def test_overlap():
    """One less the total variation distance, mean over layers."""
    assert overlap([[1.0, 0.0]], [[1.0, 0.0]]) == 1
    assert overlap([[1.0, 0.0]], [[0.0, 1.0]]) == 0
    assert overlap([[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]) == pytest.approx(0.875)


def test_tasks_of_a_domain_are_added_up():
    """By hand: two tasks of 10 and 30 tokens of one domain; a domain with one task is the task."""
    one = Routed(2.0, 10, [[10.0, 0.0, 10.0, 0.0, 5.0, 5.0, 10.0, 0.0, 0.0, 10.0, 10.0]])
    three = Routed(4.0, 30, [[0.0, 30.0, 0.0, 30.0, 15.0, 15.0, 0.0, 30.0, 0.0, 30.0, 30.0]])
    found = described({"math/a": one, "code/x": one, "math/b": three}, 2)
    assert list(found) == ["math", "math/a", "code/x", "math/b"]
    assert found["math"]["choices"] == [[0.25, 0.75]] and found["math"]["tokens"] == 40 and found["math"]["loss"] == 3.5
    assert described({"math": one, "math/a": one, "math/b": three}, 2)["math"]["tokens"] == 10
    assert overlaps(found)["math/a"] == {"math": 0.25, "math/a": 1.0, "code/x": 1.0, "math/b": 0.0}


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


def test_hostile_text_stays_data(tmp_path):
    """No name or token can end the script or start an element."""
    hostile = "</script><script>alert(1)</script><!--"
    routed = {"pieces": [hostile, "\u2028"], "layers": [0], "gates": [[[1.0, 0.0], [0.0, 0.0]]]}
    write_page(tmp_path / "page.html", {hostile: {hostile: routed}}, [hostile, "b"])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)</script>" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["models"][hostile][hostile]["pieces"] == routed["pieces"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        ("{}", "is no routing.json"),
        ('{"experts": ["a", "b"], "models": ["x"]}', "is no routing.json"),
        (
            '{"experts": ["a", "b"], "models": {"x": {"y": {"loss": 1, "layers": [0]}}}}',
            "is no routing.json.*'entropy'",
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
