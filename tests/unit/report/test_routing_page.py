"""The page of tokens: hostile names stay data, gates come back from their sparse form, and a failure leaves no half."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from megatron_btx.common.files import write_atomically, write_json
from megatron_btx.report.routing import write_page
from tests.unit.report.test_routing_figures import full_disk

HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "\"'`&quot;", "$x$ \\u003c", "{{data}}", "{{title}}"]
HOSTILE += ["\u2028\x00\x7f", "__proto__"]


def routed(gates_LTE: list[list[list[float]]]) -> dict[str, Any]:
    pieces = [f"token {at}" for at in range(len(gates_LTE[0]))]
    return {"pieces": pieces, "layers": list(range(len(gates_LTE))), "gates": gates_LTE}


def data_of(file: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_data(name, tmp_path):
    """As model, label, expert and token; what comes back is what was given."""
    text = {**routed([[[1.0, 0.0], [0.0, 0.0]]]), "pieces": [name, ""]}
    write_page(tmp_path / "page.html", {name: {name: text}}, [name, "b"])
    page, data = (tmp_path / "page.html").read_text(), data_of(tmp_path / "page.html")
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
    assert page.count(f"<title>Tokens by expert: {escape(name)}</title>") == 1
    assert data["experts"] == [name, "b"]
    assert data["models"][name][name] == {"pieces": [name, ""], "layers": [0], "gates": [[[[0, 1.0]], []]]}


def test_gates_come_back(tmp_path):
    """Pairs of expert and gate, the largest first and of equal ones the first expert; the rest is zero."""
    gates = [[[0.0, 0.25, 0.0, 0.75], [0.0, 0.0, 0.0, 0.0]], [[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]]]
    write_page(tmp_path / "page.html", {"m": {"x": routed(gates)}}, list("abcd"))
    found = data_of(tmp_path / "page.html")["models"]["m"]["x"]
    assert found["gates"] == [[[[3, 0.75], [1, 0.25]], []], [[[0, 0.5], [2, 0.5]], [[2, 1.0]]]]
    dense = [[[dict(token).get(expert, 0.0) for expert in range(4)] for token in layer] for layer in found["gates"]]
    assert dense == gates


@pytest.mark.parametrize(
    ("trained", "opened"), [((), "mix"), (("btx",), "btx"), (("btx", "later"), "btx"), (("mix", "btx"), "mix")]
)
def test_it_opens_on_the_first_model_whose_routers_were_trained(trained, opened, tmp_path):
    """Without one on the first; a fresh mix that is given first is not what it opens on."""
    texts = {name: {"x": routed([[[1.0]]])} for name in ("mix", "btx", "later")}
    write_page(tmp_path / "page.html", texts, ["a"], trained)
    assert data_of(tmp_path / "page.html")["opened"] == opened
    assert 'options(get("model"), models, data.opened)' in (tmp_path / "page.html").read_text()


def test_pages_of_many_experts_are_small(tmp_path):
    """Two of sixteen gates: less than half of what all of them would take."""
    gates = [[[0.25, 0.75, *[0.0] * 14] for _ in range(200)] for _ in range(16)]
    texts = {"m": {"x": routed(gates)}}
    write_page(tmp_path / "page.html", texts, [f"e{number}" for number in range(16)])
    assert (tmp_path / "page.html").stat().st_size < len(json.dumps(texts, separators=(",", ":"))) / 2
    assert texts["m"]["x"]["gates"] is gates and len(gates[0][0]) == 16  # the caller's stay as they are


def test_forty_experts_look_different(tmp_path):
    """A colour or a hatch apart; for every hatch the page has a style, of background and of border."""
    write_page(tmp_path / "page.html", {"m": {"x": routed([[[1.0] * 40]])}}, [f"e{number}" for number in range(40)])
    data, page = data_of(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
    assert len(set(zip(data["colours"], data["hatches"], strict=True))) == 40
    for hatch in set(data["hatches"]) - {0}:
        style = re.search(rf"\.hatch{hatch} {{(.*?)}}", page, re.DOTALL)
        assert style and "border-bottom-style" in style[1] and "background-image" in style[1]


def test_it_needs_no_network(tmp_path):
    """Nothing in it names another place."""
    write_page(tmp_path / "page.html", {"m": {"x": routed([[[1.0]]])}}, ["a"])
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch\(", (tmp_path / "page.html").read_text())


@pytest.mark.parametrize("of", ["page", "json"])
def test_a_full_disk_leaves_the_old_file(of, tmp_path):
    """And nothing beside it; the error names the file."""
    file = tmp_path / "file"
    file.write_text("old")
    with full_disk(4096), pytest.raises(OSError) as caught:
        if of == "page":
            write_page(file, {"m": {"x": routed([[[1.0]]])}}, ["a"])
        else:
            write_json(file, list(range(4096)))
    assert caught.value.filename == str(file)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


def test_bytes_and_text_are_written_whole(tmp_path):
    """In place of what was there, text as UTF-8, line ends as they are."""
    for content, expected in ((b"\x00\xff", b"\x00\xff"), ("ü\r\n", b"\xc3\xbc\r\n")):
        write_atomically(tmp_path / "file", content)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [expected]


def test_json_makes_its_folder(tmp_path):
    """As deep as it is named."""
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}
