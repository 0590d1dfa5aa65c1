"""A page that colours the tokens of a text by the expert that takes them: one file, no network, layer selectable."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_btx.ground.files import write_atomically
from megatron_btx.report.figures import HATCHES, Palette


def write_page(file: Path, texts: dict[str, dict[str, Any]], experts: list[str], trained: Collection[str] = ()) -> None:
    """Write the page: the whole one or, when that fails, none.

    It opens on the first model whose routers were trained, because those of a fresh mix say nothing yet; without one,
    on the first.

    Args:
        texts: model -> label -> the result of :func:`megatron_btx.evaluation.routing.route_text`.
        trained: the models whose routers were trained.
    """
    palette = Palette(experts)
    content = {
        "experts": experts,
        "colours": [palette.colour(name) for name in experts],
        "hatches": [HATCHES.index(palette.hatch(name)) for name in experts],
        "opened": next((model for model in texts if model in trained), next(iter(texts), None)),
        "models": {model: {label: _packed(routed) for label, routed in of.items()} for model, of in texts.items()},
    }
    # In a script element only "</" and "<!--" could end or change what follows.
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    filling = {"title": html.escape(f"Tokens by expert: {', '.join(texts)}"), "data": data}
    # All at once: a name that looks like a place to fill is not filled.
    page = re.sub(r"\{\{(title|data)\}\}", lambda place: filling[place[1]], _PAGE)
    write_atomically(file, page.encode("utf-8", "xmlcharrefreplace"))


def _packed(routed: dict[str, Any]) -> dict[str, Any]:
    """The same with pairs [expert, gate] for the gates above zero, largest first: most of [L, T, E] is zeros."""
    gates = [[_pairs(gates_E) for gates_E in layer] for layer in routed["gates"]]
    return {"pieces": routed["pieces"], "layers": routed["layers"], "gates": gates}


def _pairs(gates_E: list[float]) -> list[tuple[int, float]]:
    pairs = [(expert, gate) for expert, gate in enumerate(gates_E) if gate > 0]
    return sorted(pairs, key=lambda pair: -pair[1])  # stable: of equal ones the first expert, as argmax takes it


# The page opens on the middle layer, because the first one sees hardly more of a token than which one it is.
_PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 1.5rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
.head { position: sticky; top: 0; z-index: 1; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ddd; }
.controls { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; }
.controls label { display: flex; gap: .4rem; align-items: center; max-width: 100%; }
select { max-width: 18rem; min-width: 0; }
#number { min-width: 2ch; }
#about { height: 3em; overflow: auto; margin-top: .3rem; font-size: 14px; overflow-wrap: anywhere; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .25rem 1rem;
  margin: .8rem 0; }
.legend > span { overflow-wrap: anywhere; padding-left: 2.6em; text-indent: -2.6em; }
.swatch { display: inline-block; width: 2em; height: .8em; margin-right: .6em; vertical-align: -.25em; }
#text { white-space: break-spaces; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; tab-size: 4; }
/* The colour of an expert, lighter for a smaller gate. Where experts outnumber colours: lines, then dots, then both. */
.token, .swatch { border-bottom: 3px solid var(--colour, #999); background-color: var(--tint, #fff); padding: .1em 0;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.hatch1 { border-bottom-style: dashed;
  background-image: repeating-linear-gradient(135deg, var(--line) 0 1.2px, transparent 1.2px 7px); }
.hatch2 { border-bottom-style: dotted; background-size: 6px 6px;
  background-image: radial-gradient(circle, var(--line) 1.5px, transparent 1.8px); }
.hatch3 { border-bottom-style: double;
  background-image: repeating-linear-gradient(135deg, var(--line) 0 1.2px, transparent 1.2px 7px),
    repeating-linear-gradient(45deg, var(--line) 0 1.2px, transparent 1.2px 7px); }
.dropped { border-bottom: 3px dotted #999; }
.token { cursor: default; box-shadow: inset 1px 0 #fffc; scroll-margin: 9rem 0 3rem; }
.token:hover { outline: 1px solid #222; }
.token:focus { outline: 2.5px solid #222; }
.mark { color: #777; font-style: normal; user-select: none; -webkit-user-select: none; }
.printed { display: none; }
@page { size: A4; margin: 15mm; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 9.5pt; }
  .head { display: none; }
  .printed { display: block; overflow-wrap: anywhere; }
  #text { font-size: 8.5pt; }
  .token:focus { outline: none; }
  .legend { break-inside: avoid; grid-template-columns: repeat(4, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style></head><body>
<h1>{{title}}</h1>
<div class="head">
<div class="controls">
<label>model <select id="model"></select></label>
<label>text <select id="label"></select></label>
<label>layer <input id="layer" type="range" min="0" value="0" step="1">
<output id="number" for="layer"></output></label>
</div>
<div id="about" aria-live="polite"></div>
</div>
<noscript>This page needs JavaScript to show its tokens. It loads nothing from elsewhere.</noscript>
<p class="printed" id="shown"></p>
<div class="legend" id="legend" role="group"
aria-label="share of the tokens whose largest gate is the expert's"></div>
<div id="text" role="group" aria-describedby="about"
aria-label="tokens; left and right move, up and down change the layer"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const hint = "Point at, tap or tab to a token to see its gates. "
  + "On a token, the left and right arrows move, up and down change the layer.";
const unseen = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;
let routed, layer, tokens = [], current = 0;

function options(select, names, chosen) {
  const kept = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(kept) ? kept : chosen;
}
function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}
function look(shown, expert, gate) {
  shown.classList.remove("dropped", "hatch1", "hatch2", "hatch3");
  if (expert === null) {
    for (const name of ["--colour", "--tint", "--line"]) shown.style.removeProperty(name);
    shown.classList.add("dropped");
    return;
  }
  const colour = data.colours[expert], n = parseInt(colour.slice(1), 16), share = 0.15 + 0.45 * gate;
  const mix = (c) => Math.round(255 + (c - 255) * share);
  shown.style.setProperty("--colour", colour);
  shown.style.setProperty("--line", colour + "88");
  shown.style.setProperty("--tint", `rgb(${mix(n >> 16)}, ${mix((n >> 8) & 255)}, ${mix(n & 255)})`);
  if (data.hatches[expert]) shown.classList.add(`hatch${data.hatches[expert]}`);
}
// What a piece shows: nothing of it may be without an area to point at, and a copy holds the text alone.
function fill(token, piece) {
  if (piece.replace(unseen, (c) => "\n\t".includes(c) ? c : "") === "") token.append(element("i", "mark", "∅"));
  piece.split("\n").forEach((line, at) => {
    if (at) token.append(element("i", "mark", "⏎"), "\n");
    token.append(line);
  });
}
function describe(at) {
  if (!(at in tokens)) return hint;
  const piece = JSON.stringify(routed.pieces[at])
    .replace(unseen, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
  const gates = routed.gates[layer][at].map(([expert, gate]) => `${data.experts[expert]} ${gate.toFixed(3)}`);
  const none = piece === '""' ? " (no text: the end of a document, or part of a character)" : "";
  return `token ${at + 1} of ${tokens.length}, ${piece}${none}: ${gates.join(", ") || "dropped"}`;
}
function about(at) { get("about").textContent = describe(at); }
function move(at) {
  if (!(at in tokens)) return;
  if (current in tokens) tokens[current].tabIndex = -1;
  current = at;
  tokens[current].tabIndex = 0;
}
function build() {
  const texts = data.models[get("model").value];
  options(get("label"), Object.keys(texts), Object.keys(texts)[0]);
  routed = texts[get("label").value];
  get("layer").max = routed.layers.length - 1;
  tokens = routed.pieces.map((piece, at) => {
    const token = element("span", "token", "");
    token.dataset.at = at;
    token.tabIndex = -1;
    fill(token, piece);
    return token;
  });
  get("text").replaceChildren(...tokens);
  move(Math.min(current, tokens.length - 1));
  paint();
}
function paint() {
  layer = Math.min(Number(get("layer").value), routed.layers.length - 1);
  const number = routed.layers[layer] + 1, counts = data.experts.map(() => 0);
  get("number").value = number;
  get("shown").textContent = `model ${get("model").value}, text ${get("label").value}, layer ${number}`;
  let dropped = 0;
  tokens.forEach((token, at) => {
    const [expert, gate] = routed.gates[layer][at][0] ?? [null, 0];
    if (expert === null) dropped += 1; else counts[expert] += 1;
    look(token, expert, gate);
  });
  const entries = data.experts.map((name, expert) => [name, expert, counts[expert]]);
  if (dropped) entries.push(["dropped", null, dropped]);
  get("legend").replaceChildren(...entries.map(([name, expert, count]) => {
    const entry = document.createElement("span"), swatch = element("span", "swatch", "");
    look(swatch, expert, 1);
    entry.append(swatch, `${name} ${(100 * count / (tokens.length || 1)).toFixed(1)}\u00a0%`);
    return entry;
  }));
  about(get("text").contains(document.activeElement) ? current : -1);
}
const tokenOf = (event) => Number(event.target.closest(".token")?.dataset.at ?? -1);
get("text").addEventListener("pointerover", (event) => { if (tokenOf(event) >= 0) about(tokenOf(event)); });
get("text").addEventListener("pointerleave", () =>
  about(get("text").contains(document.activeElement) ? current : -1));
get("text").addEventListener("focusin", (event) => { move(tokenOf(event)); about(current); });
get("text").addEventListener("click", (event) => tokens[tokenOf(event)]?.focus());
get("text").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: tokens.length - 1 };
  const layers = { ArrowUp: 1, ArrowDown: -1 };
  if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in steps || event.key in layers)) return;
  event.preventDefault();
  if (event.key in steps) tokens[steps[event.key]]?.focus();
  else { get("layer").value = layer + layers[event.key]; paint(); }
});
const models = Object.keys(data.models);
options(get("model"), models, data.opened);
for (const id of ["model", "label"]) get(id).addEventListener("input", build);
get("layer").addEventListener("input", paint);
build();
get("layer").value = Math.floor((routed.layers.length - 1) / 2);
paint();
</script></body></html>
"""
