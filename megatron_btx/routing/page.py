"""A page that colours the tokens of a text by the expert that takes them: one file, no network, layer selectable."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from megatron_btx.recipe.figures import Palette


def write_page(file: Path, texts: dict[str, dict[str, Any]], experts: list[str]) -> None:
    """Write the page.

    Args:
        texts: model -> label -> the result of :func:`megatron_btx.routing.analysis.route_text`.
    """
    palette = Palette(experts)
    content = {"experts": experts, "colours": [palette.colour(name) for name in experts], "models": texts}
    # In a script element only "</" and "<!--" could end or change what follows.
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(f"Tokens by expert: {', '.join(texts)}")
    file.write_text(_PAGE.replace("{{title}}", title).replace("{{data}}", data), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; }
.controls { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; position: sticky; top: 0; background: #fff;
  padding: .5rem 0; border-bottom: 1px solid #ddd; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: .8rem 0; }
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: .35em; vertical-align: -.12em;
  border: 1px solid #555; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; }
#text span { border-bottom: 3px solid transparent; padding: .1em 0; }
#text span:hover { outline: 2px solid #222; }
#about { min-height: 1.6em; font-family: ui-monospace, monospace; }
@media print { .controls { position: static; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style></head><body>
<h1>{{title}}</h1>
<div class="controls">
<label>model <select id="model"></select></label>
<label>text <select id="label"></select></label>
<label>layer <input id="layer" type="range" min="0" value="0" step="1">
<output id="number" for="layer"></output></label>
</div>
<div class="legend" id="legend" aria-label="share of the tokens whose first choice is the expert"></div>
<div id="about" aria-live="polite">Point at a token to see its gates.
Left and right arrows on the slider change the layer.</div>
<div id="text"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
function options(select, names) {
  const kept = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(kept)) select.value = kept;
}
function tint(colour, gate) {
  const n = parseInt(colour.slice(1), 16), share = 0.15 + 0.45 * gate;
  const mix = (c) => Math.round(255 + (c - 255) * share);
  return `rgb(${mix(n >> 16)}, ${mix((n >> 8) & 255)}, ${mix(n & 255)})`;
}
function show() {
  const texts = data.models[get("model").value];
  options(get("label"), Object.keys(texts));
  const routed = texts[get("label").value];
  get("layer").max = routed.layers.length - 1;
  const layer = Math.min(Number(get("layer").value), routed.layers.length - 1);
  get("number").value = routed.layers[layer] + 1;
  const counts = data.experts.map(() => 0);
  let dropped = 0;
  const spans = routed.pieces.map((piece, at) => {
    const gates = routed.gates[layer][at], best = gates.indexOf(Math.max(...gates));
    const span = document.createElement("span");
    span.textContent = piece;
    if (gates[best] > 0) {
      counts[best] += 1;
      span.style.background = tint(data.colours[best], gates[best]);
      span.style.borderBottomColor = data.colours[best];
    } else dropped += 1;
    const chosen = gates.map((gate, expert) => [gate, data.experts[expert]]).filter(([gate]) => gate > 0)
      .sort((a, b) => b[0] - a[0]).map(([gate, name]) => `${name} ${gate.toFixed(3)}`).join(", ") || "dropped";
    span.title = `${JSON.stringify(piece)}: ${chosen}`;
    span.onmouseenter = () => { get("about").textContent = `token ${at + 1}, ${span.title}`; };
    return span;
  });
  get("text").replaceChildren(...spans);
  const total = routed.pieces.length || 1;
  const entries = data.experts.map((name, expert) => [name, data.colours[expert], counts[expert]]);
  if (dropped) entries.push(["dropped", "#ffffff", dropped]);
  get("legend").replaceChildren(...entries.map(([name, colour, count]) => {
    const entry = document.createElement("span"), swatch = document.createElement("span");
    swatch.className = "swatch"; swatch.style.background = colour;
    entry.append(swatch, `${name} ${(100 * count / total).toFixed(1)} %`);
    return entry;
  }));
}
options(get("model"), Object.keys(data.models));
for (const id of ["model", "label", "layer"]) get(id).addEventListener("input", show);
show();
</script></body></html>
"""
