"""A page that colours the tokens of a text by the expert that takes them: one file, no network, layer selectable."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_btx.common.files import write_atomically
from megatron_btx.report.pages import render_page
from megatron_btx.report.style import HATCHES, Palette

Texts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> label -> pieces, layers and gates [L, T, E] of a text."""


def write_page(file: Path, texts: Texts, experts: Sequence[str], trained: Collection[str] = ()) -> None:
    """Write the page: the whole one or, when that fails, none.

    It opens on the first model whose routers were trained, because those of a fresh mix say nothing yet; without one,
    on the first.

    Args:
        texts: model -> label -> the result of :func:`megatron_btx.evaluation.token_routes.route_text`.
        trained: the models whose routers were trained.
    """
    palette = Palette(experts)
    models: dict[str, dict[str, Any]] = {}
    for model, labels in texts.items():
        models[model] = {label: _pack(routed) for label, routed in labels.items()}
    content = {
        "experts": experts,
        "colours": list(map(palette.colour, experts)),
        "hatches": [HATCHES.index(palette.hatch(name)) for name in experts],
        "opened": _choose_opened(list(texts), trained),
        "models": models,
    }
    data = jinja2.utils.htmlsafe_json_dumps(
        content, dumps=json.dumps, ensure_ascii=True, sort_keys=False, separators=(",", ":")
    )
    page = render_page("tokens.html.j2", title=f"Tokens by expert: {', '.join(texts)}", data=data)
    write_atomically(file, page.encode("utf-8", "xmlcharrefreplace"))


def _choose_opened(models: Sequence[str], trained: Collection[str]) -> str | None:
    return next((model for model in models if model in trained), next(iter(models), None))


def _pack(routed: Mapping[str, Any]) -> dict[str, Any]:
    """The same with pairs [expert, gate] for the gates above zero, largest first: most of [L, T, E] is zeros."""
    layers = [list(map(_pair, gates_TE)) for gates_TE in routed["gates"]]
    return {"pieces": routed["pieces"], "layers": routed["layers"], "gates": layers}


def _pair(gates_E: Sequence[float]) -> list[tuple[int, float]]:
    pairs = [(expert, gate) for expert, gate in enumerate(gates_E) if gate > 0]
    return sorted(pairs, key=lambda pair: -pair[1])  # stable: of equal ones the first expert, as argmax takes it
