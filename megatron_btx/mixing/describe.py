"""A plan for people: the sources, the rules, the result's configuration; and where a tensor comes from."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_btx.checkpoint.arguments import model_flags
from megatron_btx.checkpoint.huggingface.servers import server_lines
from megatron_btx.checkpoint.safetensors import CONFIG
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.compatible import remarks, vocabulary_source
from megatron_btx.mixing.compute import STEP_BYTES
from megatron_btx.mixing.layout import Fill, LaidOutTensor
from megatron_btx.mixing.loader import EMBEDDING, Source
from megatron_btx.mixing.methods import METHODS
from megatron_btx.mixing.operations import describe_routers, new_routers
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.writers import Output
from megatron_btx.tokenizers.vocabulary import UnknownVocabularyError

if TYPE_CHECKING:
    import torch

_NEW_ROWS = "new rows, each the mean of all tokens' rows"
_TENSOR_PARALLEL_SIZES = (2, 4, 8)
_IMPORTS_BYTES = 250 << 20
"""What Python and torch take before any work."""
_SAMPLES = 4096
_ONE_HOT = 0.1
"""Below this entropy the choice of experts is all but made."""


def plan_text(plan: Plan, output: Output, workers: int) -> str:
    """The plan as a table: the sources, and for each kind of tensor the rule that makes it, count and bytes."""
    request = plan.request
    lines = [f"{request.method}: {METHODS[request.method].summary}"]
    for number, source in enumerate(plan.sources):
        form = f"Megatron, {source.dialect.name} layers"
        if source.is_hugging_face:
            form = "Hugging Face"
        share = ""
        if source is plan.base:
            share = "  of no weight"
        elif request.weights:
            share = f"  weight {plan.weights[number]:.4g}"
        lines.append(f"  {number}  {source.name:<12} {source.folder}  ({form}){share}")
    lines.append(f"  {'tensor of the result':<62} {'number':>6} {'shape':<18} {'MiB':>10}  made by")
    kinds: dict[str, list[LaidOutTensor]] = {}
    for tensor in output.tensors:  # those whose names differ in the number of a layer or expert alone, together
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", tensor.name), []).append(tensor)
    for pattern, tensors in kinds.items():
        shape = "x".join(str(extent) for extent in tensors[0].shape)
        size_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
        rules: dict[str, None] = {}
        for block in tensors[0].blocks:
            for fill in block.fills:
                rules[fill.planned.operation.describe(plan, fill.planned)] = None
        made_by = "; ".join(rules)
        lines.append(f"  {pattern:<62} {len(tensors):>6} {shape:<18} {size_bytes / 2**20:>10.2f}  {made_by}")
    memory = _IMPORTS_BYTES + workers * STEP_BYTES * (4 + 2 * len(plan.sources))
    lines.append(
        f"  {len(output.tensors)} tensors as {output.format}, {plan.input_bytes / 2**20:.1f} MiB to read, "
        f"{output.size_bytes / 2**20:.1f} MiB to write, about {memory / 2**20:.0f} MiB of memory with {workers} workers"
    )
    lines += _vocabulary_lines(plan)
    lines += [f"  note: {remark}" for remark in remarks(plan)]
    lines.append(f"  tokenizer of the result: {output.tokenizer['said']}")
    if output.format == "hf":
        config = json.loads(output.small_files[CONFIG])
        lines.append(f"  result: {' '.join(json.dumps(config, sort_keys=True).split())}")
        lines += server_lines(config)
    else:
        lines.append(f"  result: {' '.join(' '.join(flag) for flag in model_flags(plan.arguments))}")
    return "\n".join(lines + router_text(plan))


def _vocabulary_lines(plan: Plan) -> list[str]:
    lines = [f"  vocabulary of {source.name}: {_vocabulary_of(source)}" for source in plan.sources]
    embedding = next(planned for planned in plan.pieces if planned.name == EMBEDDING)
    rows, new = embedding.shape[0], embedding.new_rows
    chosen = vocabulary_source(plan.mixed, plan.request)
    made = ""
    if new:
        made = f", {new} of them {_NEW_ROWS}"
    lines.append(
        f"  vocabulary of the result: that of {chosen.name} with {chosen.token_count} tokens, {rows} rows{made}"
    )
    refused = [str(size) for size in _TENSOR_PARALLEL_SIZES if rows % size]
    if refused:
        lines.append(
            f"  note: Megatron cannot train {rows} rows with a tensor parallel size of {' or '.join(refused)}, which "
            "does not divide them; --pad-vocab-to-multiple-of 128 adds rows until it does"
        )
    return lines


def _vocabulary_of(source: Source) -> str:
    rows = source.pieces[EMBEDDING].shape[0]
    try:
        vocabulary = source.tokenizer.vocabulary
    except UnknownVocabularyError as error:
        return f"not known ({error}); its configuration counts {source.token_count} tokens in {rows} rows"
    beyond = sum(number >= rows for number in vocabulary.tokens)
    without = ""
    if beyond:
        without = f", {beyond} more tokens have no row"
    return f"{source.token_count} tokens in {rows} rows, by {vocabulary.base}{without}"


def router_text(plan: Plan) -> list[str]:
    """What routing a mix starts with, and a warning where that is no good start; nothing for dense results."""
    if not plan.arguments.get("btx_untrained_routers") or METHODS[plan.request.method].experts is None:
        return []
    init = plan.request.router
    route = starting_route(new_routers(plan), plan.request.topk)
    lines = [
        f"  routers ({describe_routers(init)}): for inputs of unit RMS the routing probabilities have "
        f"{route.entropy:.0%} of the largest entropy, the first gate is {route.first_gate:.2f}, experts get "
        f"{route.least_load:.2f} to {route.largest_load:.2f} of an even load"
    ]
    if route.entropy < _ONE_HOT:
        lines.append(
            "  warning: routing starts nearly one-hot, so gradients hardly reach the other experts; "
            "a smaller --router-std (the default is 0.02) starts softer"
        )
    elif route.least_load == 0:
        lines.append("  warning: some experts get no token at first; with equal logits the first k experts get all")
    return lines


class StartingRoute(NamedTuple):
    """What routing starts with, for inputs of unit root mean square."""

    entropy: float
    """Mean entropy of the routing probabilities, as a share of its largest value ln E."""
    first_gate: float
    """Mean share of the expert with the largest gate among the k chosen: 1 is one-hot, 1/k even."""
    least_load: float
    largest_load: float
    """Smallest and largest share of (token, choice) pairs that an expert of any layer gets, as a share of even."""


def starting_route(rows_LEH: torch.Tensor, topk: int) -> StartingRoute:
    """Estimate the routing of a fresh mix from normal inputs of unit root mean square (as norms make them)."""
    import torch

    experts, hidden = rows_LEH.shape[1:]
    inputs_TH = torch.randn(_SAMPLES, hidden, generator=torch.Generator().manual_seed(0))
    entropy = first_gate = 0.0
    loads = []
    for weight_EH in rows_LEH:
        logits_TE = inputs_TH @ weight_EH.T
        log_probabilities_TE = torch.log_softmax(logits_TE, dim=-1)
        entropy += float(-(log_probabilities_TE.exp() * log_probabilities_TE).sum(-1).mean()) / math.log(experts)
        chosen = torch.topk(logits_TE, topk, dim=-1)
        gates_TK = torch.softmax(chosen.values, dim=-1) if topk > 1 else log_probabilities_TE.exp().amax(-1, True)
        first_gate += float(gates_TK[:, 0].mean())
        loads.append(torch.bincount(chosen.indices.flatten(), minlength=experts) * experts / (topk * _SAMPLES))
    layers = len(rows_LEH)
    load_LE = torch.stack(loads)
    return StartingRoute(entropy / layers, first_gate / layers, float(load_LE.min()), float(load_LE.max()))


def explain(plan: Plan, output: Output, name: str) -> str:
    """Where a tensor of the result comes from: for each of its slices the rule, the sources and their rows.

    Raises:
        InputError: the result has no such tensor.
    """
    tensors = {tensor.name: tensor for tensor in output.tensors}
    if name not in tensors:
        close = difflib.get_close_matches(name, tensors, cutoff=0)
        raise InputError(
            f"--explain {name}: the result has no such tensor; there is {', '.join(close)}; --dry-run shows all kinds "
            "of them"
        )
    tensor = tensors[name]
    lines = [f"{name}  {list(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}"]
    for block in tensor.blocks:
        axis = len(block.sizes) - len(block.fills[0].planned.shape)
        place = ""
        if axis:
            place = f"[{', '.join(map(str, block.offsets[:axis]))}] "
        row = block.offsets[axis]
        for text, rows in _explain_fills(plan, block.fills):
            lines.append(f"  {place}rows {row}:{row + rows}  {text}")
            row += rows
    return "\n".join(lines)


def _explain_fills(plan: Plan, fills: Sequence[Fill]) -> Iterator[tuple[str, int]]:
    """What fills a block, in words, and how many rows each line stands for: all made of the same parts."""
    for fill in fills:
        planned, had = fill.planned, fill.planned.source_rows
        if fill.start < had:
            stretches = planned.operation.stretches(plan, planned, fill.start, min(fill.stop, had))
            rule = planned.operation.describe(plan, planned)
            for low, high, parts in stretches:
                origin = ""
                if parts:
                    origin = f" from {', '.join(_explain_part(plan, planned, part) for part in parts)}"
                yield f"{planned.name} rows {low}:{high}: {rule}{origin}", high - low
        if fill.stop > had:
            low = max(fill.start, had)
            yield f"{planned.name} rows {low}:{fill.stop}: {_NEW_ROWS}", fill.stop - low


def _explain_part(plan: Plan, planned: PlannedPiece, part: Part) -> str:
    """A source's tensor, its index on the leading axes, and the rows or columns of its piece that are taken."""
    source = plan.sources[part.source]
    held = source.pieces[part.piece]
    index = "".join(f"[{number}]" for number in held.location.lead)
    cut = ""
    if part.stop - part.start != held.shape[planned.axis]:
        cut = f" {('rows', 'columns')[planned.axis]} {part.start}:{part.stop}"
    return f"{source.name}: {held.location.key}{index} ({part.piece}{cut})"
