"""Routing as numbers: per label, layer and expert, summed over all ranks; and token by token for one text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.shares import DEAD_SHARE, routing_distance


class Routed(NamedTuple):
    """Where the tokens of a text went, summed over all ranks."""

    loss: float
    """Nats per token."""
    tokens: int
    sums: list[list[float]]
    """Per layer: choices, first choices, probabilities and gates per expert; entropy, tokens, choices before drops."""


def route_label(model: list[Any], where: str, prefix: str) -> Routed:
    """Where the tokens of a dataset's start go."""
    import torch
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.step import batches_of, forward
    from megatron_btx.model.watch import watching

    args = get_args()
    experts = args.num_experts
    batches = batches_of(start_of(prefix, args.btx_route_tokens), where)
    sums_LC = torch.zeros(args.num_layers, 4 * experts + 3, dtype=torch.float64, device="cuda")

    def add(layer: int, router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        gates_TE, map_TE = outputs[0].reshape(-1, experts), outputs[1].reshape(-1, experts)
        log_TE = torch.log_softmax(router.gating(x_SBH).reshape(-1, experts).float(), dim=-1)
        first_TE = torch.nn.functional.one_hot(gates_TE.argmax(dim=-1), experts) * map_TE  # none where all was dropped
        tokens = len(log_TE)
        columns = torch.stack([map_TE.sum(0), first_TE.sum(0), log_TE.exp().double().sum(0), gates_TE.double().sum(0)])
        sums_LC[layer, : 4 * experts] += columns.flatten()
        sums_LC[layer, -3] -= (log_TE.exp() * log_TE).double().sum()
        sums_LC[layer, -2] += tokens
        sums_LC[layer, -1] += tokens * router.topk

    with watching(model, add):
        loss, tokens = forward(model, batches)
    torch.distributed.all_reduce(sums_LC)
    return Routed(loss, tokens, sums_LC.tolist())


def described(routed: Mapping[str, Routed], experts: int) -> dict[str, dict[str, Any]]:
    """The numbers of every label; of domains that are given by two tasks or more, also of all of them together.

    Returns:
        loss and tokens, and for every mixture layer (a list each): ``layers`` its number from 0, ``choices`` [E] shares
        of all choices, ``first`` [E] shares of first choices, ``probabilities`` [E] mean of the full softmax, ``gates``
        [E] mean gate, ``entropy`` in nats, ``dropped`` share of choices, ``dead`` numbers of dead experts.
    """
    result = {}
    for label in routed:
        domain, _, task = label.partition("/")
        parts = [part for other, part in routed.items() if other.startswith(f"{domain}/")]
        if task and len(parts) > 1 and domain not in routed and domain not in result:
            tokens = sum(part.tokens for part in parts)
            loss = sum(part.loss * part.tokens for part in parts) / tokens
            sums_LC = [
                [sum(cells) for cells in zip(*rows, strict=True)]
                for rows in zip(*(part.sums for part in parts), strict=True)
            ]
            result[domain] = {"loss": loss, "tokens": tokens, **shares(sums_LC, experts)}
        part = routed[label]
        result[label] = {"loss": part.loss, "tokens": part.tokens, **shares(part.sums, experts)}
    return result


def shares(sums_LC: list[list[float]], experts: int) -> dict[str, Any]:
    """The shares and means of :func:`described` from sums; layers without tokens are dense and left out."""
    names = ("layers", "choices", "first", "probabilities", "gates", "entropy", "dropped", "dead")
    result: dict[str, Any] = {name: [] for name in names}
    for layer, row in enumerate(sums_LC):
        choices, first, probabilities, gates = (row[at * experts : (at + 1) * experts] for at in range(4))
        entropy, tokens, wanted = row[4 * experts :]
        if not tokens:
            continue
        taken = _shares(choices)
        values = (
            layer,
            taken,
            _shares(first),
            [value / tokens for value in probabilities],
            [value / tokens for value in gates],
            entropy / tokens,
            1.0 - sum(choices) / wanted,
            [expert for expert, share in enumerate(taken) if share < DEAD_SHARE / experts],
        )
        for name, value in zip(names, values, strict=True):
            result[name].append(value)
    return result


def _shares(counts: list[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def overlap(one: list[list[float]], other: list[list[float]]) -> float:
    """Mean over layers of 1 less the total variation distance of two labels' shares [L, E]: 1 is the same routing."""
    return 1.0 - routing_distance(one, other)


def overlaps(labels: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The overlap of every two labels of a model."""
    return {a: {b: overlap(labels[a]["choices"], labels[b]["choices"]) for b in labels} for a in labels}


def route_text(model: list[Any], text: str, is_text: bool) -> dict[str, Any]:
    """The route of every token of a text (or of the start of the dataset ``text``), up to one micro-batch.

    Returns:
        ``pieces``: the tokens' texts; ``layers``: numbers from 0; ``gates``: [L, T, E], rounded to 1/1000.
    """
    import numpy as np
    import torch
    from megatron.core import mpu
    from megatron.training import get_args, get_tokenizer

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.step import batches_of, forward
    from megatron_btx.model.watch import mixtures, watching

    args, tokenizer = get_args(), get_tokenizer()
    length, micro = args.seq_length, args.micro_batch_size
    if is_text:
        ids = [int(token) for token in tokenizer.tokenize(text)][: micro * length]
    else:
        ids = [int(token) for token in start_of(text, length)][:length]
    # One micro-batch, the same on every data-parallel rank and as often as a pipeline needs; what follows the text
    # changes nothing before it (but under a capacity, which looks at later tokens).
    repeats = mpu.get_data_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size()
    padded = np.resize(np.array(ids, dtype=np.int64), micro * length)
    padded[len(ids) :] = 0
    batches = batches_of(np.append(np.tile(padded, repeats), 0), "the text")
    gates_LBSE = torch.zeros(args.num_layers, micro, length, args.num_experts, device="cuda")
    first = mpu.get_tensor_model_parallel_rank()

    def add(layer: int, _router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        part = x_SBH.shape[0]
        gates_SBE = outputs[0].float().reshape(part, micro, -1)
        at = first * part if part < length else 0
        gates_LBSE[layer, :, at : at + part] = gates_SBE.transpose(0, 1)

    with watching(model, add):
        forward(model, batches)
    if mpu.get_data_parallel_rank() > 0:
        gates_LBSE.zero_()
    torch.distributed.all_reduce(gates_LBSE)
    layers = mixtures()
    gates_LTE = gates_LBSE[layers].flatten(1, 2)[:, : len(ids)]
    rounded = [[[round(g, 3) for g in token] for token in layer] for layer in gates_LTE.tolist()]
    pieces = [f"{token} " for token in ids] if args.tokenizer_type == "NullTokenizer" else pieces_of(ids, tokenizer)
    return {"pieces": pieces, "layers": layers, "gates": rounded}


def pieces_of(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; together they are the text, even where a character takes several tokens.

    A token's text depends on the one before it (SentencePiece's blanks), so that two pieces are decoded at a time.
    """
    pieces: list[str] = []
    start = read = 0
    for count in range(1, len(ids) + 1):
        before = tokenizer.detokenize(ids[start:read]) if read > start else ""
        after = tokenizer.detokenize(ids[start:count])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids):  # in a character: its last token shows it
            pieces.append("")
            continue
        pieces.append(after[len(before) :] if after.startswith(before) else tokenizer.detokenize(ids[read:count]))
        start, read = read, count
    return pieces


def read_earlier(files: list[Path], names: list[str], experts: list[str]) -> dict[str, Any]:
    """The models of earlier analyses, by name.

    Raises:
        InputError: a file is no routing.json, of other experts, or has a name that is taken.
    """
    models: dict[str, Any] = {}
    for file in files:
        where = f"--btx-route-beside {file}"
        try:
            content = json.loads(file.read_text())
            found, of = content["models"], content["experts"]
            for labels in found.values():
                for routed in labels.values():
                    _check_numbers(routed, len(of))
        except FileNotFoundError:
            raise InputError(f"{where}: there is no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: is no routing.json of this tool ({error}); analyse that model again") from error
        if of != experts:
            raise InputError(f"{where}: its experts are {', '.join(of)}, expected {', '.join(experts)}")
        for name, routed in found.items():
            if name in models or name in names:
                raise InputError(f"{where}: its model {name} is there already; name one of them otherwise")
            models[name] = routed
    return models


def _check_numbers(routed: Mapping[str, Any], experts: int) -> None:
    """Raises ValueError, KeyError or TypeError where one of the numbers of :func:`described` is not as it should be."""
    layers = len(routed["layers"])
    lists = [routed[name] for name in ("entropy", "dropped", "dead", "choices", "first", "probabilities", "gates")]
    if not layers or any(len(values) != layers for values in lists):
        raise ValueError("its lists have other lengths than its layers")
    if any(len(row) != experts for rows in lists[3:] for row in rows):
        raise ValueError("its shares are not one per expert")
    sum(routed["entropy"], sum(routed["dropped"], float(routed["loss"])))  # numbers


def table(models: dict[str, Any], experts: list[str]) -> str:
    """For every model and label: the expert that most first choices go to, its share, entropy and dead experts."""
    lines = [
        f"{'model':<16} {'label':<20} {'most to':<14} {'share':>7} {'entropy of even':>16} {'dead':>5} {'dropped':>8}"
    ]
    for name, labels in models.items():
        for label, routed in labels.items():
            count = len(routed["layers"])
            mean = [sum(layer[e] for layer in routed["first"]) / count for e in range(len(experts))]
            most = mean.index(max(mean))
            entropy = sum(routed["entropy"]) / count / math.log(max(len(experts), 2))
            dead, dropped = sum(map(len, routed["dead"])), sum(routed["dropped"]) / count
            numbers = f"{mean[most]:>7.1%} {entropy:>16.2f} {dead:>5} {dropped:>8.1%}"
            lines.append(f"{name:<16} {label:<20} {experts[most]:<14} {numbers}")
    return "\n".join(lines)
